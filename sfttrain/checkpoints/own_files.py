"""Which files of a folder sfttrain has written, so that only they are replaced and deleted.

A folder that is being written has `sft_incomplete`, from before its first file to after its seal.
Without a seal it is torn, whatever is in it: so files of two runs are never taken for one.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Collection
from pathlib import Path

from sftprep.shards import is_temporary_name, write_bytes
from sfttrain.checkpoints.seal import INCOMPLETE_NAME, SEAL_NAME, STATE_NAME, files_in, sealed_names

_SAVED = re.compile(
    r"(model|pytorch_model|adapter_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
    r"|(config|generation_config|adapter_config|trainer_state|vocab|added_tokens)\.json"
    r"|(special_tokens_map|preprocessor_config|processor_config)\.json"
    r"|tokenizer.*\.(json|model)|chat_template\.(jinja|json)|(vocab|merges)\.txt|.*\.bpe\.model"
    r"|spiece\.model|training_args\.bin|README\.md"
    r"|(modeling|configuration|tokenization|processing)_\w+\.py"
    rf"|{re.escape(SEAL_NAME)}|{INCOMPLETE_NAME}"
)
"""Files that a saved model or adapter consists of."""

_RESUMED = re.compile(
    r"(optimizer|scheduler|scaler|optimizer_\d+|scheduler_\d+)\.(pt|bin)|rng_state(_\d+)?\.pth"
    rf"|stream_state-\d+\.json|{re.escape(STATE_NAME)}|checkpoint-is-incomplete\.txt"
    r"|latest|zero_to_fp32\.py|pytorch_model_fsdp\.bin"
)
"""Files that a checkpoint has in addition."""

_SHARDED = re.compile(r"(pytorch_model_fsdp|optimizer|scheduler)_\d+|global_step\d+")
"""Folders in a checkpoint of FSDP and DeepSpeed, all of whose files are theirs."""


def is_saved_name(name: str) -> bool:
    """Whether a saved model or adapter may have a file of this name."""
    return _SAVED.fullmatch(name) is not None


def is_own_folder(folder: Path) -> bool:
    """Whether sfttrain has written a folder, or has begun to."""
    return any(is_regular(folder / name) for name in (STATE_NAME, SEAL_NAME, INCOMPLETE_NAME))


def is_regular(path: Path) -> bool:
    """Whether a path is a file, and not a link to one."""
    return path.is_file() and not path.is_symlink()


def begin_folder(folder: Path) -> None:
    """Mark a folder as being written, and delete what an earlier run has written to it.

    `seal_checkpoint` ends this. Files of the user stay, and are not sealed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = _own_files(folder)
    others = {
        name: [path.stat().st_mtime_ns, path.stat().st_size]
        for name, path in files_in(folder).items()
        if name not in own and path.is_file()
    }
    write_bytes(folder / INCOMPLETE_NAME, json.dumps({"others": others}).encode())
    # The seal goes first: without it, the marker says that the folder is torn.
    (folder / SEAL_NAME).unlink(missing_ok=True)
    _delete(folder, own - {INCOMPLETE_NAME})


def delete_folder(folder: Path) -> None:
    """Delete what sfttrain has written to a folder, and the folder if nothing else is in it.

    A file that cannot be deleted stays.
    """
    own = _own_files(folder)
    # The marks go last, so that a folder that was deleted in part is known as ours.
    marks = {INCOMPLETE_NAME, STATE_NAME, SEAL_NAME} & own
    with contextlib.suppress(OSError):
        _delete(folder, own - marks)
        _delete(folder, marks)
        folder.rmdir()


def begin_output(folder: Path) -> None:
    """Mark an output folder in which the final model is being saved."""
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / INCOMPLETE_NAME, b"{}")


def seal_output(folder: Path) -> None:
    """List the files of the final model in an output folder, which are ours from then on."""
    files = {
        path.name: {"bytes": path.stat().st_size}
        for path in sorted(folder.iterdir())
        if is_saved_name(path.name)
        and path.name not in (SEAL_NAME, INCOMPLETE_NAME)
        and is_regular(path)
    }
    write_bytes(folder / SEAL_NAME, json.dumps({"files": files}, indent=1).encode())
    (folder / INCOMPLETE_NAME).unlink(missing_ok=True)


def _own_files(folder: Path) -> set[str]:
    """The files of a folder of ours that are not the user's: as sealed, or else by their names."""
    present = files_in(folder)
    listed = sealed_names(folder)
    marks = {STATE_NAME, SEAL_NAME, INCOMPLETE_NAME}
    if listed:
        return {name for name in present if name in listed or name in marks}
    return {name for name in present if name in marks or _is_ours_by_name(name)}


def _is_ours_by_name(path: str) -> bool:
    *folders, name = path.split("/")
    return (
        any(_SHARDED.fullmatch(part) for part in folders)
        or is_temporary_name(name)
        or _SAVED.fullmatch(name) is not None
        or _RESUMED.fullmatch(name) is not None
    )


def _delete(folder: Path, names: Collection[str]) -> None:
    """Delete files, and the folders below `folder` that become empty."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
    # The deepest first, since a folder may become empty by those in it.
    parents = {folder / parent for name in names for parent in Path(name).parents[:-1]}
    for parent in sorted(parents, reverse=True):
        if not os.listdir(parent):
            parent.rmdir()
