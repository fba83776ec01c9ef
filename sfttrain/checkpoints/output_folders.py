"""Which folders in an output folder a run may write to and delete, and what a failed save means.

A folder is ours if it has `sft_files.json`, which is written last, or `sft_incomplete` or
`sft_state.json`, which are written first: so the torn checkpoint of a run that was killed is ours
as well, and is replaced when the run comes to that step again. Anything else belongs to the user:
it is neither replaced nor deleted, and nothing is written through a link.

The final model is saved at the top of the output folder, among files of the user. A file there is
ours if `sft_files.json` lists it, or where the folder has checkpoints of ours.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sftprep.errors import OutputExists, StorageError
from sftprep.shards import is_temporary_name
from sfttrain.checkpoints.own_files import delete_folder, is_own_folder, is_regular, is_saved_name
from sfttrain.checkpoints.seal import INCOMPLETE_NAME, SEAL_NAME, sealed_names

MERGED_NAME = "merged"
"""Folder beside an adapter that holds the merged model."""

_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]*)")


def checkpoints_in(output_dir: str | os.PathLike[str]) -> dict[int, Path]:
    """Return whatever is named as a checkpoint of an output folder, by its step."""
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
    """Refuse to write to a folder that is not ours (see the module).

    Raises:
        OutputExists: it is a link, has a link in it, is not a folder, or has files of others.
    """
    remedy = f"move {folder} away, or give another output_dir"
    if folder.is_symlink():
        raise OutputExists(f"{folder} is a link, and is not written through", remedy=remedy)
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise OutputExists(f"{folder} is a file, and a folder is needed", remedy=remedy)
    # A run that was killed while it wrote its first file left a temporary one.
    if all(is_temporary_name(name) for name in os.listdir(folder)):
        return
    if not is_own_folder(folder):
        raise OutputExists(
            f"{folder} has files that sfttrain did not write, and would be replaced", remedy=remedy
        )
    for root, folders, files in os.walk(folder):
        for path in (Path(root, name) for name in (*folders, *files)):
            if path.is_symlink():
                raise OutputExists(f"{path} is a link, and is not written through", remedy=remedy)


def reject_output(folder: Path, adapters: Iterable[str] = ()) -> None:
    """Refuse to save a model to an output folder that has such files of the user's.

    Args:
        folder: the output folder.
        adapters: names of adapters that are saved in folders of their own.

    Raises:
        OutputExists: a file of a model there is a link, or was not written by sfttrain.
    """
    if not folder.is_dir():
        return  # there is none yet; a file is refused with the settings
    remedy = "give another output_dir, or move it away"
    places = [folder, *(folder / name for name in adapters if name != "default")]
    found = []
    for place in places:
        if place != folder and place.is_symlink():
            raise OutputExists(f"{place} is a link, and is not written through", remedy=remedy)
        names = sorted(os.listdir(place)) if place.is_dir() else []
        found += [place / name for name in names if is_saved_name(name)]
    for path in found:
        if path.is_symlink():
            raise OutputExists(f"{path} is a link, and is not written through", remedy=remedy)
        if not path.is_file():
            raise OutputExists(f"{path} is a folder, and a file is needed", remedy=remedy)
    marked = is_regular(folder / INCOMPLETE_NAME)
    if marked or any(is_own_folder(path) for path in checkpoints_in(folder).values()):
        return
    listed = {*sealed_names(folder), SEAL_NAME}
    if others := [path for path in found if path.parent == folder and path.name not in listed]:
        more = f" and {len(others) - 1} more" if others[1:] else ""
        raise OutputExists(
            f"{others[0]}{more} would be replaced by the trained model, and sfttrain did not write"
            f" {'them' if more else 'it'}",
            remedy=remedy,
        )


def reject_to_train_in_place(output_dir: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Refuse an output folder in which the run would replace what it is started from.

    Args:
        output_dir: the output folder.
        names: of the model, tokenizer and adapter that are read; those that are not folders, such
            as names on the Hub, are left out.

    Raises:
        OutputExists: the output folder is one of them or in it, or one is in a checkpoint there.
    """
    output = Path(output_dir).expanduser().resolve()
    for name in names:
        if not name or not Path(name).expanduser().is_dir():
            continue
        folder = Path(name).expanduser().resolve()
        same = output.exists() and output.samefile(folder)
        if same or folder == output or folder in output.parents:
            what = "is" if same or folder == output else "is in"
            raise OutputExists(
                f"output_dir {output_dir} {what} the folder {name}, which the run is started from",
                remedy="give another output_dir",
            )
        part = folder.relative_to(output).parts[0] if output in folder.parents else ""
        if part == MERGED_NAME or _CHECKPOINT.fullmatch(part):
            raise OutputExists(
                f"the run is started from {name}, which it may replace or delete, since it is in"
                f" output_dir {output_dir}",
                remedy="give another output_dir, or resume with --resume_from_checkpoint",
            )


def rotate_checkpoints(
    output_dir: str | os.PathLike[str],
    limit: int,
    *,
    kept: Collection[str],
    written: Collection[str] = (),
) -> None:
    """Delete old checkpoints until `limit` are left, as transformers does, but only ours.

    Only sealed checkpoints and those that this run has written are counted and deleted; links and
    all other folders stay. A file that the user added to a checkpoint stays, and so does its
    folder. Checkpoints of earlier runs go first, then the lowest steps.

    Args:
        output_dir: folder of the checkpoints.
        limit: how many may stay.
        kept: names that are never deleted: the newest and the best checkpoint.
        written: names of the checkpoints that this run has written.
    """
    ours = [
        (path.name in written, step, path)
        for step, path in checkpoints_in(output_dir).items()
        if path.is_dir()
        and not path.is_symlink()
        and (path.name in written or is_regular(path / SEAL_NAME))
    ]
    deletable = [path for _, _, path in sorted(ours) if path.name not in kept]
    surplus = len(ours) - max(limit, len(ours) - len(deletable))
    for path in deletable[: max(surplus, 0)]:
        delete_folder(path)


@contextmanager
def save_errors(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what a full disk, or a folder that cannot be written to, raises into a StorageError."""
    try:
        yield
    except StorageError as error:  # of files that are written by sftprep, whose remedies are others
        if not isinstance(error.__cause__, OSError):
            raise
        raise _storage_error(folder, error.__cause__) from error
    except OSError as error:
        # Errors of networks are OSErrors too, and come from a push to the Hub.
        if error.errno is None or isinstance(error, (ConnectionError, TimeoutError)):
            raise
        raise _storage_error(folder, error) from error
    except Exception as error:
        if not _is_failed_write(error):
            raise
        raise _storage_error(folder, error) from error


def _is_failed_write(error: Exception) -> bool:
    """Whether safetensors or torch could not write a file; they have no type for it."""
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
    remedies = {
        errno.EACCES: "check who may write there, or give another --output_dir",
        errno.EROFS: "give an --output_dir on a file system that can be written to",
        errno.EFBIG: "a limit on file sizes is set (ulimit -f): raise it",
    }
    space = "free some space, or keep fewer checkpoints with --save_total_limit"
    return StorageError(
        f"cannot write {os.fspath(folder)}: {reason[:300]}",
        remedy=f"{remedies.get(number or 0, space)}; then resume with"
        " --resume_from_checkpoint latest, if a checkpoint was saved before",
    )
