"""The output folder of a build in parts: several processes write to its work folder.

Parts only add files to the work folder: under temporary names that are unique among machines, and
then under names that the content or its origin determines. So two processes that do the same work
do no harm, and no lock is needed between parts. A shared lock excludes the build that finishes the
parts, and removes the work folder, while a part runs on the same machine (or on others, where the
file system has such locks).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sftprep.core.atomic_write import storage_errors
from sftprep.errors import OutputBusy
from sftprep.pipeline.output.contents import check_contents, check_not_finished
from sftprep.pipeline.output.folder import create_work_folder, created_folders
from sftprep.shards.layout import LOCK_NAME, WORK_FOLDER, has_work_folder
from sftprep.shards.locks import shared


@contextmanager
def join_output(root: Path, *, overwrite: bool) -> Iterator[Path]:
    """Create the work folder of an output folder, or join the parts that work in it.

    Args:
        root: The output folder.
        overwrite: Whether the parts are to replace a finished build in it.

    Yields:
        The work folder.

    Raises:
        OutputExists: The folder contains a finished build that may not be replaced, or files of a
            user, or it is inside the folder of another build.
        OutputBusy: A build without a part is using the folder.
        StorageError: The folder cannot be written.
    """
    work = root / WORK_FOLDER
    with created_folders(root):
        with storage_errors(root):
            if not has_work_folder(root):
                check_contents(root, overwrite=overwrite)
                create_work_folder(root)
            elif not overwrite:
                check_not_finished(root)
        remedy = "wait until it has ended, and run this part again if the build is not finished"
        with shared(work / LOCK_NAME, "another build", root, remedy=remedy):
            check_joined(root)
            yield work


def check_joined(root: Path) -> None:
    """Check that the work folder still exists.

    Raises:
        OutputBusy: A build on another machine has finished the parts and removed it.
    """
    if not has_work_folder(root):
        raise OutputBusy(
            f"another build finished {root} while this part ran",
            remedy="finish the build only when all parts have ended",
        )
