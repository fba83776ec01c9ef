"""Code of models and tokenizers, and the limits of `trust_remote_code`.

It permits the code of the repository or folder that the user named, at a fixed commit. The files of
a model can refer to code elsewhere (`"auto_map": {"AutoModel": "other/repo--module.Class"}`, or the
base model of an adapter), which the user has not read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sftprep.errors import ConfigError, setting
from sfttrain.config.model_config import ModelConfig

_IMPLEMENTATION = re.compile(r"(?:attn|experts)_implementation")
"""Keys of a configuration whose values may be kernels on the Hub."""
_CONFIG_FILES = ("config.json", "tokenizer_config.json", "adapter_config.json")


def check_code_is_pinned(config: ModelConfig) -> None:
    """Check that code of a repository runs only from a specified commit.

    The code of a branch or tag may change at any time.

    Raises:
        ConfigError: If trust_remote_code is set for a repository without a commit, or a revision
            is specified for a folder.
    """
    name = str(config.model_name_or_path)
    reject_revision_of_folder(name, config.model_revision)
    if (
        config.trust_remote_code
        and not os.path.isdir(name)
        and not is_commit(config.model_revision)
    ):
        raise ConfigError(
            f"{setting('trust_remote_code')} would run code of {name} at {config.model_revision},"
            " which may change",
            remedy=(
                "read the code, and specify its commit (40 hex digits):"
                f" {setting('model_revision', 'COMMIT')}"
            ),
        )


def reject_revision_of_folder(name: str, revision: str | None) -> None:
    """Check that a revision is not specified for a folder.

    A folder in the working directory, such as one that came with data, replaces the model
    of the same name on the Hub, at any revision.

    Args:
        name: The folder or Hub name of a model or tokenizer.
        revision: Its revision; None and "main" are the defaults.

    Raises:
        ConfigError: The name is that of a folder, and the revision is not a default.
    """
    if revision in (None, "", "main") or not os.path.isdir(os.path.expanduser(name)):
        return
    raise ConfigError(
        f"{setting('model_revision', revision)} is for the Hub, but {name} is a local folder",
        remedy=[
            f"for the model on the Hub, run in a working directory without the folder {name}",
            f"for the folder, leave out {setting('model_revision')}",
        ],
    )


def is_commit(revision: str | None) -> bool:
    """Return whether a revision is a complete commit id."""
    return re.fullmatch(r"[0-9a-f]{40}", revision or "") is not None


def code_that_runs(config: ModelConfig) -> str:
    """Return the code permitted by trust_remote_code.

    Returns:
        repository@commit, a folder, or "".
    """
    if not config.trust_remote_code:
        return ""
    name = str(config.model_name_or_path)
    return os.path.abspath(name) if os.path.isdir(name) else f"{name}@{config.model_revision}"


def check_code_references(name: str, revision: str | None = None) -> None:
    """Check that the files of a model refer to no code outside of it.

    Args:
        name: The folder or Hub name of the model.
        revision: The commit on the Hub.

    Raises:
        ConfigError: They refer to code of another repository or folder.
    """
    for file in _CONFIG_FILES:
        for reference in _references_in(_read_config(name, file, revision)):
            if reference != name:
                raise ConfigError(
                    f"{file} of {name} refers to code in {reference}, to which"
                    f" {setting('trust_remote_code')} does not apply",
                    remedy=[
                        "copy the model and the code that you have read into one folder",
                        f"remove {setting('trust_remote_code')}",
                    ],
                )


def check_kernel_references(
    name: str, revision: str | None = None, subfolder: str = "", *, is_base: bool = False
) -> None:
    """Check that the configuration of a model names no kernels on the Hub.

    transformers would download and run them before another attention is chosen. The base model of
    an adapter is checked as well.

    Args:
        name: The folder or Hub name of the model.
        revision: The commit on the Hub.
        subfolder: The folder of the model in it.
        is_base: Whether this is the base model of an adapter.

    Raises:
        ConfigError: It names kernels.
    """
    base = _read_config(name, "adapter_config.json", revision).get("base_model_name_or_path")
    if isinstance(base, str) and base and base != name and not is_base:
        check_kernel_references(base, is_base=True)
    config = _read_config(name, os.path.join(subfolder, "config.json"), revision)
    values: list[tuple[str, Any]] = [("", config)]
    while values:
        key, value = values.pop()
        if isinstance(value, dict):
            is_implementation = _IMPLEMENTATION.search(key) is not None
            values.extend((key if is_implementation else k, v) for k, v in value.items())
        elif isinstance(value, list):
            values.extend((key, item) for item in value)
        elif isinstance(value, str) and _IMPLEMENTATION.search(key) and _may_be_kernels(value):
            raise ConfigError(
                f"config.json of {name} names the kernels {value} in {key}, which are code that"
                " the command line does not name",
                remedy=[
                    f"remove {key} from its config.json",
                    f"remove it, and name kernels that you trust with {setting('attn', value)}",
                ],
            )


def _may_be_kernels(implementation: str) -> bool:
    """Return whether transformers looks for an implementation on the Hub.

    Without the package flash-attn, it does so for flash attention as well.
    """
    is_flash = "flash_attention" in implementation and find_spec("flash_attn") is None
    return "/" in implementation or is_flash


def _references_in(config: dict[str, Any]) -> Iterator[str]:
    """Yield the other repositories with code for a configuration.

    transformers would run that code.
    """
    base = config.get("base_model_name_or_path")
    if isinstance(base, str):
        yield base
    entries = [config.get("auto_map")]
    while entries:
        entry = entries.pop()
        if isinstance(entry, dict):
            entries.extend(entry.values())
        elif isinstance(entry, list):
            entries.extend(entry)
        elif isinstance(entry, str):
            repository, separator, module = entry.rpartition("--")
            if separator:
                yield repository
            # A module is a file of the model; a path leads out of it.
            if "/" in module or "\\" in module or module.startswith("."):
                yield module


def _read_config(name: str, file: str, revision: str | None) -> dict[str, Any]:
    """Return a configuration file of a model; empty if missing or not an object."""
    if os.path.isdir(os.path.expanduser(name)):
        path: Path | str | None = Path(name).expanduser() / file
    else:
        from transformers.utils import cached_file

        options = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
        path = cached_file(name, file, **options)
    try:
        content = json.loads(Path(path).read_bytes()) if path is not None else {}
    except (OSError, ValueError, RecursionError):
        return {}  # transformers reports it
    return content if isinstance(content, dict) else {}
