"""From the name of a tokenizer to its `TokenizerSpec`: found on disk or on the Hub, resolved once,
then kept in the cache.

What a tokenizer does is what `transformers.AutoTokenizer` makes of it, and that is not always what
its tokenizer.json says (Qwen2's class replaces the pre-tokenizer, T5's the vocabulary). But
importing it imports torch: seconds, and hundreds of megabytes. So a child process asks it
(`sftprep.tokenize.loading.resolve`), once for each state of the tokenizer's files.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from fnmatch import fnmatch
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from sftprep.config.cache_location import cache_dir
from sftprep.core.disk_cache import read_entry, write_entry
from sftprep.core.regular_files import open_regular_file
from sftprep.core.subprocesses import module_command, module_environment
from sftprep.core.versions import version_of
from sftprep.errors import TokenizerError
from sftprep.tokenize.loading.spec import TokenizerSpec, tokenizer_spec

__all__ = ["TokenizerSpec", "load_tokenizer", "read_spec", "tokenizer_spec", "write_spec"]

SPEC_SUFFIX = ".spec"
"""Ends the name of a file of `write_spec` that is given for a tokenizer; see
`sftprep.tokenize.loading.export`."""

_FORMAT = 2
"""Raised when an entry of the cache, or the way it is made, changes."""

_FILES = (
    "tokenizer*",
    "*.model",
    "*.tiktoken",
    "vocab*",
    "merges*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "tekken.json",
)
_VOCABULARIES = ("tokenizer.json", "*.model", "*.tiktoken", "vocab*", "tekken.json")
"""At least one of these makes a folder one that holds a tokenizer."""
_READ_SUFFIXES = frozenset({".json", ".jinja", ".txt", ".model", ".tiktoken", ".py"})
"""Ends of the names of all files that transformers may open in the folder of a tokenizer."""
_CONFIG = "config.json"
_CONFIG_KEYS = ("model_type", "model_name", "tokenizer_class", "auto_map", "transformers_version")
"""What AutoTokenizer looks at in the model's config.json; the rest of it may change without
touching the tokenizer."""


def load_tokenizer(
    name_or_dir: str, *, revision: str | None = None, cache: Path | None = None
) -> TokenizerSpec:
    """The tokenizer of a folder, or of a name on the Hub (at `revision`: branch, tag or commit), as
    AutoTokenizer sees it.

    cache: folder of resolved tokenizers, `cache_dir()` by default; the first use of a tokenizer
    takes seconds, the next ones milliseconds. Code that a repository brings along is never run.
    Raises TokenizerError: nothing there, no tokenizer in it, damaged, of a kind that cannot be
    used.
    """
    if not name_or_dir:
        raise TokenizerError(
            "no tokenizer was named",
            remedy="give --tokenizer a folder, or a name on the Hub such as Qwen/Qwen3-8B",
        )
    # Path.expanduser raises RuntimeError for a user that does not exist.
    local = Path(os.path.expanduser(name_or_dir))
    if local.suffix == SPEC_SUFFIX and local.is_file():
        return _written_down(local)
    on_disk = local.is_dir()
    folder = local if on_disk else _download(name_or_dir, local, revision)
    files = _tokenizer_files(folder)
    if not any(fnmatch(name, pattern) for name in files for pattern in _VOCABULARIES):
        raise TokenizerError(
            f"{name_or_dir} holds no tokenizer: none of {', '.join(_VOCABULARIES)} is in {folder}",
            remedy="give the folder that has the tokenizer.json",
        )
    place = (cache or cache_dir()) / "tokenizers" / f"{_digest(name_or_dir, folder, files)}.json"
    spec = read_spec(place)
    if spec is None:
        with tempfile.TemporaryDirectory(prefix="sftprep-tokenizer-") as scratch:
            if on_disk:
                spec = _resolve(str(local), Path.cwd(), Path(scratch))
            else:
                _copy_of(folder, files, Path(scratch) / name_or_dir)
                spec = _resolve(name_or_dir, Path(scratch), Path(scratch))
        write_spec(place, spec)
    return dataclasses.replace(spec, name=name_or_dir)


def write_spec(path: Path, spec: TokenizerSpec) -> bool:
    """Write a spec to a file for `read_spec`, in this process or another; False where it cannot be
    written (which is logged)."""
    return write_entry(path, spec.to_fields(), body=spec.json)


def read_spec(path: Path) -> TokenizerSpec | None:
    """The spec in a file of `write_spec`; None where there is none, or a damaged one."""
    found = read_entry(path)
    try:
        return TokenizerSpec.from_fields(*found) if found else None
    except (
        KeyError,
        TypeError,
    ):  # written by another version of TokenizerSpec, whose author forgot to raise _FORMAT
        return None


def _written_down(path: Path) -> TokenizerSpec:
    spec = read_spec(path)
    if spec is None:
        raise TokenizerError(
            f"{path} is damaged",
            remedy="remove it; it is written again by the trainer that needs it",
        )
    return spec


def _download(name: str, local: Path, revision: str | None) -> Path:
    """The folder of a Hub name in the Hub's own cache, with the files of its tokenizer and whatever
    else was there."""
    if local.exists():
        raise TokenizerError(f"{name} is a file", remedy=f"give its folder: {local.parent}")
    if local.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise TokenizerError(
            f"there is no folder {name}",
            remedy="check the path, or give a name on the Hub such as Qwen/Qwen3-8B",
        )
    try:
        from huggingface_hub import snapshot_download

        folder = snapshot_download(name, revision=revision, allow_patterns=[*_FILES, _CONFIG])
    except (
        Exception
    ) as error:  # a dozen kinds from four libraries: no network, no such name, gated, offline ...
        detail = str(error).strip().splitlines() or [""]
        raise TokenizerError(
            f"there is no folder {name}, and the Hub does not give a tokenizer of that name:"
            f" {type(error).__name__}: {detail[0]}",
            remedy=(
                "check the name; log in (`hf auth login`) where it is gated; without a network,"
                " give a folder"
            ),
        ) from error
    return Path(folder)


def _tokenizer_files(folder: Path) -> list[str]:
    """Names, relative to the folder and sorted, of the files that make the tokenizer."""
    try:
        candidates = [*folder.iterdir(), *(folder / "additional_chat_templates").glob("*.jinja")]
    except OSError as error:
        raise TokenizerError(
            f"cannot read the folder {folder}: {error.strerror}", remedy="check its permissions"
        ) from error
    for path in candidates:
        # transformers would wait for who writes to a pipe, or read a device for ever.
        if (
            path.suffix in _READ_SUFFIXES
            and path.exists()
            and not (path.is_file() or path.is_dir())
        ):
            raise TokenizerError(
                f"{path} is not a regular file",
                remedy="replace it by a regular file: the tokenizer cannot be read from a pipe or"
                " device",
            )
    names = (str(path.relative_to(folder).as_posix()) for path in candidates if path.is_file())
    return sorted(name for name in names if any(fnmatch(name, pattern) for pattern in _FILES))


def _digest(name: str, folder: Path, files: list[str]) -> str:
    """SHA-256 of all that a resolved tokenizer depends on."""
    # AutoTokenizer goes by the name for a few repositories (deepseek-ai/deepseek-coder-*): an
    # absolute path is none of them.
    state = sha256(
        json.dumps(
            [_FORMAT, _versions(), "" if os.path.isabs(name) else name, _config_of(folder)]
        ).encode()
    )
    for file in files:
        try:
            with open_regular_file(folder / file) as stream:
                state.update(f"\n{file} {os.fstat(stream.fileno()).st_size}\n".encode())
                # In parts: fresh memory for ten megabytes takes longer than their digest.
                while part := stream.read(1 << 18):
                    state.update(part)
        except OSError as error:
            raise TokenizerError(
                f"cannot read {folder / file}: {error.strerror}", remedy="check its permissions"
            ) from error
    return state.hexdigest()


@cache
def _versions() -> dict[str, str]:
    """Versions of the packages that take part in resolving, read without importing them."""
    packages = ("transformers", "tokenizers", "sentencepiece", "tiktoken", "mistral-common")
    return {package: version_of(package) for package in packages}


def _config_of(folder: Path) -> Any:
    try:
        with open_regular_file(folder / _CONFIG) as stream:
            content = stream.read()
    except OSError:
        return None
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return sha256(content).hexdigest()
    return {key: values.get(key) for key in _CONFIG_KEYS} if isinstance(values, dict) else None


def _copy_of(folder: Path, files: list[str], target: Path) -> None:
    """The tokenizer of a Hub repository under its own name, where AutoTokenizer finds all of it and
    looks for nothing online."""
    for file in [*files, _CONFIG]:
        if (folder / file).exists():
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / file, target / file)


def _resolve(name: str, directory: Path, scratch: Path) -> TokenizerSpec:
    """Ask AutoTokenizer in a child process that runs in `directory`. Raises TokenizerError with
    what it had to say."""
    answer = scratch / "answer.json"
    try:
        child = subprocess.run(
            module_command("sftprep.tokenize.loading.resolve", name, str(answer)),
            cwd=directory,
            env={
                **module_environment(),
                "TRANSFORMERS_VERBOSITY": "error",
                "TOKENIZERS_PARALLELISM": "false",
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise TokenizerError(
            f"cannot start Python ({sys.executable}) to load the tokenizer {name}:"
            f" {error.strerror}",
            remedy="run sftprep with a Python that is still installed",
        ) from error
    if not answer.exists():
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise TokenizerError(
            f"the process that loads the tokenizer {name} ended with exit code {child.returncode}:"
            f" {last}",
            remedy=(
                'run `python -c "from transformers import AutoTokenizer"`: it must work in this'
                " environment"
            ),
        )
    values = json.loads(answer.read_text(encoding="utf-8"))
    if "error" in values:
        raise TokenizerError(values["error"], remedy=values["remedy"])
    return TokenizerSpec.from_fields(values, values.pop("json").encode())
