"""Loading of a tokenizer: from a folder or Hub name to a `TokenizerSpec`.

What a tokenizer does is what `transformers.AutoTokenizer` makes of it, and that is not always what
its tokenizer.json says (the class of Qwen2 replaces the pre-tokenizer, that of T5 the vocabulary).
But importing transformers imports torch, which takes seconds and hundreds of megabytes. Steps:

1. Find the folder: a local one, or one in the cache of the Hub, downloaded if necessary.
2. Look up the digest of the files of the tokenizer in the cache of sftprep.
3. If it is new, load the tokenizer with transformers in a child process
   (`sftprep.tokenize.loading.resolve`), and cache the result.
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
from sftprep.errors import HubError, TokenizerError, first_line, setting
from sftprep.tokenize.loading.spec import TokenizerSpec, tokenizer_spec

__all__ = ["TokenizerSpec", "load_tokenizer", "read_spec", "tokenizer_spec", "write_spec"]

SPEC_SUFFIX = ".spec"
"""Suffix of the files of `write_spec` that can be used as a tokenizer; see `export_tokenizer`."""

_LONGEST_LOADING = 600
"""Seconds until a process that loads a tokenizer is ended."""
_FORMAT = 3  # to be increased when an entry of the cache, or how it is made, changes

# Files that AutoTokenizer may read for a tokenizer. A change in one of them is another tokenizer.
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
# A folder must have at least one of these to hold a tokenizer.
_VOCABULARIES = ("tokenizer.json", "*.model", "*.tiktoken", "vocab*", "tekken.json")
# Suffixes of all files that transformers may open in the folder of a tokenizer.
_READ_SUFFIXES = frozenset({".json", ".jinja", ".txt", ".model", ".tiktoken", ".py"})
# What AutoTokenizer reads from the config.json of the model. Other values do not affect the
# tokenizer, so a change in one of them does not make a new cache entry.
_CONFIG = "config.json"
_CONFIG_KEYS = ("model_type", "model_name", "tokenizer_class", "auto_map", "transformers_version")


def load_tokenizer(
    name_or_dir: str, *, revision: str | None = None, cache: Path | None = None
) -> TokenizerSpec:
    """Load a tokenizer as AutoTokenizer does, from a folder or from the Hub.

    The first use of a tokenizer takes seconds, later ones milliseconds. Code in a repository is
    never run.

    Args:
        name_or_dir: A folder, a name on the Hub, or a file of `export_tokenizer`.
        revision: A branch, tag or commit of the repository on the Hub.
        cache: The folder of resolved tokenizers; `cache_dir()` by default.

    Raises:
        TokenizerError: The path or name does not exist, or holds no tokenizer, a damaged one, or
            one of an unsupported kind.
        HubError: The Hub cannot be reached.
    """
    if not name_or_dir:
        raise TokenizerError(
            "no tokenizer was specified",
            remedy=(
                f"set {setting('tokenizer')} to a folder, or to a name on the Hub such as"
                " Qwen/Qwen3-8B"
            ),
        )
    # Path.expanduser raises RuntimeError for a user that does not exist.
    local = Path(os.path.expanduser(name_or_dir))
    if local.suffix == SPEC_SUFFIX and local.is_file():
        return _read_exported(local)
    is_local = local.is_dir()
    if is_local and revision is not None:
        raise TokenizerError(
            f"{name_or_dir} is a local folder, which has no revision {revision}",
            remedy="leave out the revision, or run in a working directory without this folder",
        )
    folder = local if is_local else _download(name_or_dir, local, revision)
    files = _find_tokenizer_files(folder)
    if not any(fnmatch(name, pattern) for name in files for pattern in _VOCABULARIES):
        raise TokenizerError(
            f"{name_or_dir} holds no tokenizer: none of {', '.join(_VOCABULARIES)} is in {folder}",
            remedy="specify the folder that has the tokenizer.json",
        )
    digest = _digest_files(name_or_dir, folder, files)
    path = (cache or cache_dir()) / "tokenizers" / f"{digest}.json"
    spec = read_spec(path)
    if spec is None:
        with tempfile.TemporaryDirectory(prefix="sftprep-tokenizer-") as scratch:
            if is_local:
                spec = _resolve(str(local), Path.cwd(), Path(scratch))
            else:
                _copy_files(folder, files, Path(scratch) / name_or_dir)
                spec = _resolve(name_or_dir, Path(scratch), Path(scratch))
        write_spec(path, spec)
    return dataclasses.replace(spec, name=name_or_dir)


def write_spec(path: Path, spec: TokenizerSpec) -> bool:
    """Write a spec to a file for `read_spec`, in this process or another one.

    Returns:
        False if the file cannot be written; this is logged.
    """
    return write_entry(path, spec.to_fields(), body=spec.json)


def read_spec(path: Path) -> TokenizerSpec | None:
    """Read a file of `write_spec`; None if it does not exist or is damaged."""
    entry = read_entry(path)
    try:
        return TokenizerSpec.from_fields(*entry) if entry else None
    except (KeyError, TypeError):
        # Written by a version with other fields, in which _FORMAT should have been increased.
        return None


def _read_exported(path: Path) -> TokenizerSpec:
    spec = read_spec(path)
    if spec is None:
        raise TokenizerError(
            f"{path} is damaged",
            remedy="remove it; the trainer that needs it writes it again",
        )
    return spec


def _download(name: str, local: Path, revision: str | None) -> Path:
    """Download the files of a tokenizer to the cache of the Hub.

    Return the folder of the repository in the cache.

    Args:
        name: What the user specified.
        local: The same as a path, which is not a folder.
        revision: A branch, tag or commit.

    Raises:
        TokenizerError: The repository does not exist, or cannot be read.
        HubError: The Hub cannot be reached or read.
    """
    if local.exists():
        raise TokenizerError(f"{name} is a file", remedy=f"specify its folder: {local.parent}")
    if local.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise TokenizerError(
            f"the folder {name} does not exist",
            remedy="check the path, or specify a name on the Hub such as Qwen/Qwen3-8B",
        )
    from huggingface_hub import errors, snapshot_download

    missing = f"the folder {name} does not exist, and no tokenizer of that name"
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=[*_FILES, _CONFIG])
    except (
        errors.RepositoryNotFoundError,  # also a gated one
        errors.RevisionNotFoundError,
        errors.HFValidationError,
    ) as error:
        raise TokenizerError(
            f"{missing} can be loaded from the Hub: {type(error).__name__}: {first_line(error)}",
            remedy="check the name; if it is gated, log in (`hf auth login`)",
        ) from error
    except Exception as error:
        # Four libraries raise a dozen types here: no network, offline, a lost connection, ...
        raise HubError(
            f"{missing} is in the cache, and the Hub cannot be reached or read:"
            f" {first_line(error.__cause__ or error, 200)}",
            remedy="connect to the network (and unset HF_HUB_OFFLINE), or specify a folder",
        ) from error
    return Path(folder)


def _find_tokenizer_files(folder: Path) -> list[str]:
    """Return the names of a tokenizer's files, relative to the folder and sorted."""
    try:
        candidates = [*folder.iterdir(), *(folder / "additional_chat_templates").glob("*.jinja")]
    except OSError as error:
        raise TokenizerError(
            f"cannot read the folder {folder}: {error.strerror}", remedy="check its permissions"
        ) from error
    for path in candidates:
        # transformers would block on a pipe until another process writes to it, and would never
        # finish reading a device.
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


def _digest_files(name: str, folder: Path, files: list[str]) -> str:
    """Return the SHA-256 of all inputs of a resolved tokenizer."""
    # AutoTokenizer treats a few repositories (deepseek-ai/deepseek-coder-*) by name, so the name is
    # part of the digest, except for an absolute path, which is never one of them.
    state = sha256(
        json.dumps(
            [_FORMAT, _versions(), "" if os.path.isabs(name) else name, _read_model_config(folder)]
        ).encode()
    )
    for file in files:
        try:
            with open_regular_file(folder / file) as stream:
                state.update(f"\n{file} {os.fstat(stream.fileno()).st_size}\n".encode())
                # In small parts: allocating ten megabytes takes longer than their digest.
                while part := stream.read(1 << 18):
                    state.update(part)
        except OSError as error:
            raise TokenizerError(
                f"cannot read {folder / file}: {error.strerror}", remedy="check its permissions"
            ) from error
    return state.hexdigest()


@cache
def _versions() -> dict[str, str]:
    """Return the versions of the tokenizer packages, without importing them."""
    packages = ("transformers", "tokenizers", "sentencepiece", "tiktoken", "mistral-common")
    return {package: version_of(package) for package in packages}


def _read_model_config(folder: Path) -> Any:
    """Return the values of config.json relevant to AutoTokenizer.

    Return its digest if it is not JSON.
    """
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


def _copy_files(folder: Path, files: list[str], target: Path) -> None:
    """Copy the tokenizer of a repository to a folder named like the repository.

    AutoTokenizer then sees the same name, finds all files locally, and does not go online.
    """
    for file in [*files, _CONFIG]:
        if (folder / file).exists():
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / file, target / file)


def _resolve(name: str, directory: Path, scratch: Path) -> TokenizerSpec:
    """Load a tokenizer with AutoTokenizer in a child process.

    Args:
        name: The name or folder for AutoTokenizer.
        directory: The working directory of the child.
        scratch: A temporary folder for the answer.

    Raises:
        TokenizerError: The child cannot be started, ends without an answer, or reports an error.
    """
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
            timeout=_LONGEST_LOADING,
        )
    except subprocess.TimeoutExpired as error:
        raise TokenizerError(
            f"the tokenizer {name} could not be loaded within {_LONGEST_LOADING} s",
            remedy="check its tokenizer.json: a normalizer may multiply the text",
        ) from error
    except OSError as error:
        raise TokenizerError(
            f"cannot start Python ({sys.executable}) to load the tokenizer {name}:"
            f" {error.strerror}",
            remedy="run sftprep with a Python that is still installed",
        ) from error
    if not answer.exists():
        last_line = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise TokenizerError(
            f"the process that loads the tokenizer {name} ended with exit code {child.returncode}:"
            f" {last_line}",
            remedy=(
                'run `python -c "from transformers import AutoTokenizer"`: it must work in this'
                " environment"
            ),
        )
    values = json.loads(answer.read_text(encoding="utf-8"))
    if "error" in values:
        raise TokenizerError(values["error"], remedy=values["remedy"])
    return TokenizerSpec.from_fields(values, values.pop("json").encode())
