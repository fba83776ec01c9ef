"""Ownership of the files in a folder.

Only files that sfttrain wrote are replaced or deleted.

While a folder is being written it has `sft_incomplete`, from before its first file until after its
seal. A folder with that marker and without a seal is incomplete, whatever else it contains, so the
files of two runs are never mistaken for one checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from sftprep.shards import is_temporary_name, write_bytes
from sfttrain.checkpoints.seal import (
    INCOMPLETE_NAME,
    SEAL_NAME,
    STATE_NAME,
    list_files,
    read_fields,
    read_sealed_names,
)

_SAVED = re.compile(
    r"(model|pytorch_model|adapter_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
    r"|(config|generation_config|adapter_config|trainer_state|vocab|added_tokens)\.json"
    r"|(special_tokens_map|preprocessor_config|processor_config)\.json"
    r"|tokenizer.*\.(json|model)|chat_template\.(jinja|json)|(vocab|merges)\.txt|.*\.bpe\.model"
    r"|spiece\.model|training_args\.bin|README\.md"
    r"|(modeling|configuration|tokenization|processing)_\w+\.py"
    rf"|{re.escape(SEAL_NAME)}|{INCOMPLETE_NAME}"
)
"""The files of a saved model or adapter."""

_RESUMED = re.compile(
    r"(optimizer|scheduler|scaler|optimizer_\d+|scheduler_\d+)\.(pt|bin)|rng_state(_\d+)?\.pth"
    rf"|stream_state-\d+\.json|{re.escape(STATE_NAME)}|checkpoint-is-incomplete\.txt"
    r"|latest|zero_to_fp32\.py|pytorch_model_fsdp\.bin"
)
"""The files that a checkpoint has in addition to those of its model."""

_SHARDED = re.compile(r"(pytorch_model_fsdp|optimizer|scheduler)_\d+|global_step\d+")
"""The folders in a checkpoint of FSDP or DeepSpeed, whose files have other names."""


_NO_OTHERS = b"{}"
"""The marker of an output folder, whose files of the user are not listed."""


def is_model_file_name(name: str) -> bool:
    """Return whether a saved model or adapter can have a file of this name."""
    return _SAVED.fullmatch(name) is not None


def is_own_folder(folder: Path) -> bool:
    """Return whether sfttrain has written a folder, or has begun to write it."""
    return any(is_regular(folder / name) for name in (STATE_NAME, SEAL_NAME, INCOMPLETE_NAME))


def is_regular(path: Path) -> bool:
    """Return whether a path is a file, and not a link to one."""
    return path.is_file() and not path.is_symlink()


def begin_folder(folder: Path) -> None:
    """Mark a folder as being written, and delete the files of an earlier run in it.

    `seal_checkpoint` removes the marker. Files of the user stay, and are not sealed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ours = _find_our_files(folder)
    _mark_incomplete(folder, ours)
    # The seal is deleted first: without it, the marker shows that the folder is incomplete.
    (folder / SEAL_NAME).unlink(missing_ok=True)
    _delete_files(folder, ours - {INCOMPLETE_NAME})


def _mark_incomplete(folder: Path, ours: Collection[str]) -> None:
    """Write the marker, with the time and size of each file of the user.

    The seal leaves these files out, and they are never deleted.
    """
    others = {
        name: [path.stat().st_mtime_ns, path.stat().st_size]
        for name, path in list_files(folder).items()
        if name not in ours and path.is_file()
    }
    write_bytes(folder / INCOMPLETE_NAME, json.dumps({"others": others}).encode())


def delete_folder(folder: Path) -> None:
    """Delete the files of sfttrain in a folder, and the folder if it is empty then.

    A file that cannot be deleted stays.
    """
    ours = _find_our_files(folder)
    # The marks are deleted last, so that a partly deleted folder is still recognized as ours.
    marks = {INCOMPLETE_NAME, STATE_NAME, SEAL_NAME} & ours
    with contextlib.suppress(OSError):
        _delete_files(folder, ours - marks)
        if list_files(folder).keys() - marks:
            # Files of the user stay. The marker keeps the folder ours, so that the run can write
            # this checkpoint again, and incomplete, so that it is never chosen.
            _mark_incomplete(folder, marks)
            marks -= {INCOMPLETE_NAME}
        _delete_files(folder, marks)
        folder.rmdir()


def begin_output(folder: Path) -> None:
    """Mark an output folder while the final model is being saved there."""
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / INCOMPLETE_NAME, _NO_OTHERS)


def seal_output(folder: Path) -> None:
    """Record the files of the final model in an output folder as ours."""
    files = {
        path.name: {"bytes": path.stat().st_size}
        for path in sorted(folder.iterdir())
        if is_model_file_name(path.name)
        and path.name not in (SEAL_NAME, INCOMPLETE_NAME)
        and is_regular(path)
    }
    write_bytes(folder / SEAL_NAME, json.dumps({"files": files}, indent=1).encode())
    (folder / INCOMPLETE_NAME).unlink(missing_ok=True)


def break_links(folder: Path) -> None:
    """Replace files of a saved model by copies if they have other hard links.

    Otherwise a save that writes them in place would change a backup made with `cp -al`. Tensors are
    always saved to a new file.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if (
            is_model_file_name(path.name)
            and path.suffix != ".safetensors"
            and is_regular(path)
            and path.stat().st_nlink > 1
        ):
            write_bytes(path, path.read_bytes())


def is_own_mark(path: Path) -> bool:
    """Return whether the seal or the marker of an output folder is ours."""
    fields = read_fields(path)
    if path.name == SEAL_NAME:
        return fields.keys() == {"files"} and isinstance(fields["files"], dict)
    return fields.keys() == {"others"} or (is_regular(path) and path.read_bytes() == _NO_OTHERS)


def find_users_files(folder: Path) -> set[str]:
    """Return the files of the user in a folder.

    They are those that sfttrain did not write.
    """
    return list_files(folder).keys() - _find_our_files(folder)


def _find_our_files(folder: Path) -> set[str]:
    """Return the files of sfttrain in a folder.

    They are those in its seal. Without one, they are those with the names of our files, except for
    the files of the user that the marker lists; all of them in markers of older versions.
    """
    present = list_files(folder)
    sealed = read_sealed_names(folder)
    marks = {STATE_NAME, SEAL_NAME, INCOMPLETE_NAME} & present.keys()
    if sealed:
        return marks | (sealed & present.keys())
    others: Any = read_fields(folder / INCOMPLETE_NAME).get("others")
    if INCOMPLETE_NAME in marks and not isinstance(others, dict):
        return marks
    return marks | {
        name for name in present if _is_our_file_name(name) and name not in (others or ())
    }


def _is_our_file_name(path: str) -> bool:
    *folders, name = path.split("/")
    return (
        any(_SHARDED.fullmatch(part) for part in folders)
        or is_temporary_name(name)
        or _SAVED.fullmatch(name) is not None
        or _RESUMED.fullmatch(name) is not None
    )


def _delete_files(folder: Path, names: Collection[str]) -> None:
    """Delete files, and emptied folders below `folder`."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
    # The deepest first: a folder becomes empty only after the folders in it are deleted.
    parents = {folder / parent for name in names for parent in Path(name).parents[:-1]}
    for parent in sorted(parents, reverse=True):
        if not os.listdir(parent):
            parent.rmdir()
