"""The output folder: may this build write there, and what is left in it afterwards."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sftprep.errors import ManifestError, OutputBusy, OutputExists
from sftprep.shards.files import storage_errors
from sftprep.shards.manifest import MANIFEST_NAME, SHARD_FOLDER, Manifest, read_manifest

SPILL_FOLDER = "spill"
EVAL_FOLDER = "eval"
REJECTED_NAME = "rejected.jsonl"
_LOCK_NAME = ".lock"
_OURS = {SPILL_FOLDER, SHARD_FOLDER, EVAL_FOLDER, REJECTED_NAME, MANIFEST_NAME, _LOCK_NAME}


@contextmanager
def claimed(folder: Path, *, overwrite: bool) -> Iterator[None]:
    """Make the folder and hold it while the build runs.

    Raises OutputExists where it holds a finished build (without overwrite) or files that are not
    ours, OutputBusy where another build holds it, StorageError where it cannot be written.
    """
    with storage_errors(folder):
        existed = folder.is_dir()
        if existed:
            _check_contents(folder, overwrite=overwrite)
        folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / _LOCK_NAME):
        with storage_errors(folder):
            for name in (SPILL_FOLDER, SHARD_FOLDER):
                (folder / name).mkdir(exist_ok=True)
        yield


def clean(
    folder: Path, manifest: Manifest, evaluation: Manifest | None = None, *, keep_spill: bool
) -> None:
    """After the commit: remove the spills, shards that no manifest lists, and what killed builds
    left half-written.

    evaluation: the manifest of the build in folder/eval; where there is none now, one of before is
    removed.
    """
    _clean_shards(folder, manifest)
    if evaluation is not None:
        _clean_shards(folder / EVAL_FOLDER, evaluation)
    else:
        # Its manifest first, so that nobody takes what is left for a build.
        (folder / EVAL_FOLDER / MANIFEST_NAME).unlink(missing_ok=True)
        shutil.rmtree(folder / EVAL_FOLDER, ignore_errors=True)
    for path in folder.rglob(".*.tmp"):
        path.unlink(missing_ok=True)
    if not keep_spill:
        shutil.rmtree(folder / SPILL_FOLDER, ignore_errors=True)


def _clean_shards(folder: Path, manifest: Manifest) -> None:
    listed = {shard.name for shard in manifest.shards}
    for path in (folder / SHARD_FOLDER).iterdir():
        if path.name not in listed:
            path.unlink(missing_ok=True)


def _check_contents(folder: Path, *, overwrite: bool) -> None:
    names = set(os.listdir(folder))
    inside = set(os.listdir(folder / EVAL_FOLDER)) if (folder / EVAL_FOLDER).is_dir() else set()
    not_ours = sorted(
        f"{EVAL_FOLDER}/{name}"
        for name in inside - {SHARD_FOLDER, MANIFEST_NAME}
        if not name.startswith(".")
    )
    if MANIFEST_NAME in names and not not_ours:
        if overwrite:
            return
        try:
            manifest = read_manifest(folder)
            what = (
                f"a finished build of {manifest.rows:,} packs from"
                f" {', '.join(i.path for i in manifest.inputs[:3])}"
            )
        except ManifestError:
            what = "a build whose manifest cannot be read"
        raise OutputExists(
            f"{folder} holds {what}", remedy="give --overwrite to replace it, or another --output"
        )
    foreign = sorted(name for name in names - _OURS if not name.startswith(".")) + not_ours
    if foreign:
        raise OutputExists(
            f"{folder} is not empty: it holds {', '.join(foreign[:5])}",
            remedy="give an --output folder that is new or empty",
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    # The system drops the lock when its process ends, however it ends; a file that is left behind
    # means nothing.
    import fcntl

    with storage_errors(path):
        lock = path.open("a+b")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it before may have removed the file between our open and our lock: then
            # it locks nothing.
            held = path.exists() and os.path.samestat(os.fstat(lock.fileno()), os.stat(path))
        except OSError:
            held = False
        if not held:
            lock.seek(0)
            raise OutputBusy(
                f"another build{_holder(lock.read())} is writing to {path.parent}",
                remedy="wait for it to end, or give another --output",
            )
        lock.truncate(0)
        lock.write(json.dumps({"pid": os.getpid(), "host": os.uname().nodename}).encode())
        lock.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _holder(content: bytes) -> str:
    try:
        facts = json.loads(content)
        return f" (process {facts['pid']} on {facts['host']})"
    except (ValueError, KeyError, TypeError):
        return ""
