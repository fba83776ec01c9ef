"""Receipts of finished builds, in the cache.

A build removes its work folder. Its receipts are copied to the cache, so that the next build into
the same output folder finds the groups that have not changed; their shards stay where they are. A
receipt is small: a thousandth of its input, and the sequences held out for evaluation. The
spills are not in the cache: they are as large as the shards, and a cache is often in a home folder
with a quota. They stay in the output folder with `keep_spill`.

The cache has a size limit; the receipts that were not used for the longest time are removed first.
"""

from __future__ import annotations

import os
from collections.abc import Container
from contextlib import suppress
from pathlib import Path

from sftprep.config.cache_location import cache_dir
from sftprep.core.atomic_write import write_bytes
from sftprep.core.disk_cache import write_whole
from sftprep.pipeline.groups.receipt_files import read_receipt
from sftprep.shards.layout import hash_name, receipt_name, sizes_name

_LARGEST_FILE = 64 << 20
RECEIPTS_FOLDER = "receipts"
RECEIPTS_BYTES = 1 << 30
"""The folder of the receipts in the cache, and the most bytes that they take."""


def keep_results(work: Path, *, without: Container[str]) -> None:
    """Copy receipts, what they need, hashes and sizes to the cache, except what is too large.

    Args:
        work: The work folder of a build that is about to be committed.
        without: The keys of receipts that no later build looks for.
    """
    names = (hash_name("*"), sizes_name("*"), receipt_name("*"))
    for path in [path for name in names for path in work.glob(name)]:
        receipt = read_receipt(path) if path.suffix == ".json" else None
        if receipt is not None and receipt.key in without:
            continue
        # The receipt is last: it is used only with all of its files.
        files = [work / name for name in (receipt.other_files if receipt else ())] + [path]
        if not all(file.is_file() and file.stat().st_size <= _LARGEST_FILE for file in files):
            continue
        missing = [file for file in files if not _is_kept(file)]
        if not all(
            write_whole(_folder() / file.name, file.read_bytes(), sync=True) for file in missing
        ):
            break  # a read-only home or a full disk, which is logged
    _limit_size()


def _is_kept(file: Path) -> bool:
    """Return whether a file is in the cache; one of another size is damaged."""
    try:
        return (_folder() / file.name).stat().st_size == file.stat().st_size
    except OSError:
        return False


def restore_receipt(key: str, work: Path) -> bool:
    """Copy a receipt and its files from the cache to a work folder; return whether they exist.

    Raises:
        StorageError: A file cannot be written.
    """
    name = receipt_name(key)
    receipt = read_receipt(_folder() / name)
    if receipt is None:
        return False
    return all(restore_file(each, work) for each in (*receipt.other_files, name))


def restore_file(name: str, work: Path) -> bool:
    """Copy a file from the cache to a work folder; return whether it is there.

    Raises:
        StorageError: The file cannot be written.
    """
    try:
        content = (_folder() / name).read_bytes()
    except OSError:
        return False
    write_bytes(work / name, content)
    with suppress(OSError):
        os.utime(_folder() / name)  # it was used just now
    return True


def _limit_size() -> None:
    """Remove the files that were not used for the longest time, above the size limit."""
    with suppress(OSError), os.scandir(_folder()) as entries:
        files = [(entry.stat().st_mtime_ns, entry.stat().st_size, entry.path) for entry in entries]
        left = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if left <= RECEIPTS_BYTES:
                break
            with suppress(OSError):  # another build removed it
                os.unlink(path)
            left -= size


def _folder() -> Path:
    return cache_dir() / RECEIPTS_FOLDER
