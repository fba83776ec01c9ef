"""Ownership of folders in an output folder, rotation of checkpoints, and errors.

A folder is ours if it has `sft_files.json`, which is written last, or `sft_incomplete` or
`sft_state.json`, which are written first. So the incomplete checkpoint of a killed run is ours as
well, and is replaced when the run reaches that step again. Every other folder belongs to the user:
it is neither replaced nor deleted, and nothing is written through a link.

The final model is saved at the top of the output folder, among files of the user. A file there is
ours if `sft_files.json` lists it with its size, or if `sft_incomplete` marks the folder.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sftprep.errors import OutputExists, StorageError, setting
from sftprep.shards import is_temporary_name
from sfttrain.checkpoints.own_files import (
    delete_folder,
    find_users_files,
    is_model_file_name,
    is_own_folder,
    is_own_mark,
    is_regular,
)
from sfttrain.checkpoints.seal import (
    INCOMPLETE_NAME,
    SEAL_NAME,
    find_replaced,
    read_sealed_names,
)

MERGED_NAME = "merged"
"""The folder of the merged model, in the folder of its adapter."""

_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]*)")


def list_checkpoints(output_dir: str | os.PathLike[str]) -> dict[int, Path]:
    """Return all paths in an output folder with the name of a checkpoint, by step."""
    try:
        names = os.listdir(output_dir)
    except FileNotFoundError:
        return {}
    return {
        int(match[1]): Path(output_dir) / name
        for name in names
        if (match := _CHECKPOINT.fullmatch(name))
    }


def reject_to_replace(folder: Path) -> None:
    """Refuse to write to a folder of others (see the module).

    Raises:
        OutputExists: The folder is a link or a file, contains a link, or has files of others.
    """
    remedy = f"move {folder} away, or choose another {setting('output_dir')}"
    if folder.is_symlink():
        raise OutputExists(f"{folder} is a link, which is not followed", remedy=remedy)
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise OutputExists(f"{folder} is a file; a folder is needed", remedy=remedy)
    # A run that was killed while it wrote its first file leaves only a temporary file.
    if all(is_temporary_name(name) for name in os.listdir(folder)):
        return
    if not is_own_folder(folder):
        raise OutputExists(
            f"{folder} would be replaced, but has files that sfttrain did not write",
            remedy=remedy,
        )
    users_files = find_users_files(folder)
    for root, folders, files in os.walk(folder):
        for path in (Path(root, name) for name in (*folders, *files)):
            if path.is_symlink():
                raise OutputExists(f"{path} is a link, which is not followed", remedy=remedy)
            name = path.relative_to(folder).as_posix()
            if name in users_files and is_model_file_name(path.name):
                raise OutputExists(
                    f"{path} would be replaced, but sfttrain did not write it", remedy=remedy
                )


def reject_unowned_output(folder: Path, adapters: Iterable[str] = ()) -> None:
    """Refuse to save over a model of the user in the output folder.

    Args:
        folder: The output folder.
        adapters: The names of the adapters that are saved in folders of their own.

    Raises:
        OutputExists: A model file there is a link, or was not written by sfttrain.
    """
    if not folder.is_dir():
        return  # it does not exist yet; a file was refused along with the settings
    remedy = f"choose another {setting('output_dir')}, or move it away"
    # Collect the existing files that a save would replace.
    folders = [folder, *(folder / name for name in adapters if name != "default")]
    found: list[Path] = []
    for parent in folders:
        if parent != folder and parent.is_symlink():
            raise OutputExists(f"{parent} is a link, which is not followed", remedy=remedy)
        names = sorted(os.listdir(parent)) if parent.is_dir() else []
        found += [parent / name for name in names if is_model_file_name(name)]
    for path in found:
        if path.is_symlink():
            raise OutputExists(f"{path} is a link, which is not followed", remedy=remedy)
        if not path.is_file():
            raise OutputExists(f"{path} is a folder; a file is needed", remedy=remedy)
    # The marker shows that a run of ours was writing files here when it ended.
    sealed = read_sealed_names(folder) - find_replaced(folder)
    marks = {INCOMPLETE_NAME, SEAL_NAME}
    foreign_marks = [path for path in found if path.name in marks and not is_own_mark(path)]
    marked = is_own_mark(folder / INCOMPLETE_NAME)
    if marked:
        # A model card is often written by hand; it would be rewritten, not only replaced.
        found = [path for path in found if path.name == "README.md" and not marked]
    others = [path for path in found if path.name not in sealed | marks]
    if others := [path for path in foreign_marks + others if path.parent == folder]:
        more = f" and {len(others) - 1} more" if others[1:] else ""
        raise OutputExists(
            f"{others[0]}{more} would be replaced by the trained model, but sfttrain did not write"
            f" {'them' if more else 'it'}",
            remedy=remedy,
        )


def reject_to_train_in_place(output_dir: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Refuse an output folder if the run would replace its own starting point in it.

    Args:
        output_dir: The output folder.
        names: The names of the model, the tokenizer and the adapter that the run reads. Names that
            are not folders, such as those on the Hub, are ignored.

    Raises:
        OutputExists: The output folder is one of these folders or inside one, or one of them is
            in a checkpoint of the output folder.
    """
    output = Path(output_dir).expanduser().resolve()
    for name in names:
        if not name or not Path(name).expanduser().is_dir():
            continue
        folder = Path(name).expanduser().resolve()
        # samefile sees bind mounts and file systems that ignore case, which paths do not show.
        is_same = output.exists() and output.samefile(folder)
        if is_same or folder == output or folder in output.parents:
            relation = "is" if is_same or folder == output else "is in"
            raise OutputExists(
                f"{setting('output_dir')} {output_dir} {relation} the folder {name}, which the run"
                " starts from",
                remedy=f"choose another {setting('output_dir')}",
            )
        child = folder.relative_to(output).parts[0] if output in folder.parents else ""
        if child == MERGED_NAME or _CHECKPOINT.fullmatch(child):
            raise OutputExists(
                f"the run starts from {name}, which it may replace or delete, because it is in"
                f" {setting('output_dir')} {output_dir}",
                remedy=[
                    f"choose another {setting('output_dir')}",
                    f"resume with {setting('resume_from_checkpoint')}",
                ],
            )


def rotate_checkpoints(
    output_dir: str | os.PathLike[str],
    limit: int,
    *,
    protected: Collection[str],
    own_names: Collection[str] = (),
) -> None:
    """Delete old checkpoints of ours until `limit` are left, as transformers does.

    Only sealed checkpoints and those that this run has written are counted and deleted; links and
    all other folders stay. A file that the user added to a checkpoint stays, and so does its
    folder. Checkpoints of earlier runs are deleted first, then those with the lowest steps.

    Args:
        output_dir: The folder of the checkpoints.
        limit: The number of checkpoints that may stay.
        protected: The names that are never deleted: the newest and the best checkpoint.
        own_names: The names of the checkpoints that this run has written.

    Example:
        limit=2, protected={"checkpoint-30"}, checkpoints of steps 10, 20 and 30, of which the run
        wrote 10 and 30  ->  deletes checkpoint-20
    """
    ours = [
        (path.name in own_names, step, path)
        for step, path in list_checkpoints(output_dir).items()
        if path.is_dir()
        and not path.is_symlink()
        and (path.name in own_names or is_regular(path / SEAL_NAME))
    ]
    deletable = [path for _, _, path in sorted(ours) if path.name not in protected]
    # The protected checkpoints can be more than the limit.
    surplus = len(ours) - max(limit, len(ours) - len(deletable))
    for path in deletable[: max(surplus, 0)]:
        delete_folder(path)


@contextmanager
def save_errors(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Convert the errors of a full disk or a read-only folder into a StorageError."""
    try:
        yield
    except StorageError as error:  # raised by sftprep's writers, whose remedies concern a build
        if not isinstance(error.__cause__, OSError):
            raise
        raise _storage_error(folder, error.__cause__) from error
    except OSError as error:
        # A push to the Hub raises network errors, which are OSErrors too.
        if error.errno is None or isinstance(error, (ConnectionError, TimeoutError)):
            raise
        raise _storage_error(folder, error) from error
    except Exception as error:
        if not _is_failed_write(error):
            raise
        raise _storage_error(folder, error) from error


def _is_failed_write(error: Exception) -> bool:
    """Return whether safetensors or torch failed to write a file.

    Neither has an exception type for it.
    """
    from safetensors import SafetensorError

    text = str(error)
    if isinstance(error, SafetensorError):
        return "I/O error" in text or "os error" in text
    return isinstance(error, RuntimeError) and any(
        part in text for part in ("PytorchStreamWriter", "inline_container", "file in the archive")
    )


def _storage_error(folder: str | os.PathLike[str], error: Exception) -> StorageError:
    number = getattr(error, "errno", None)
    reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(
        str(error).split()
    )
    output_dir = setting("output_dir")
    remedies = {
        errno.EACCES: f"check the permissions there, or choose another {output_dir}",
        errno.EROFS: f"choose an {output_dir} on a writable file system",
        errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    }
    space = f"free some space, or keep fewer checkpoints with {setting('save_total_limit')}"
    return StorageError(
        f"cannot write {os.fspath(folder)}: {reason[:300]}",
        remedy=f"{remedies.get(number or 0, space)}; then resume with"
        f" {setting('resume_from_checkpoint', 'latest')}, if a checkpoint was saved before",
    )
