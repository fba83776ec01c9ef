"""Whether a checkpoint is complete: all of its files are there, with their content.

A checkpoint is sealed when all of its files are written: `sft_files.json`, written last, has the
size and digest of each. A sealed checkpoint is complete if its files have these digests. One
without a seal that has `sft_incomplete` is torn: its run was ended while it was saved. One without
either (of an older version) must have the files that a resume needs; they are read in full, and
must belong together (`contents`).
"""

from __future__ import annotations

import json
import logging
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from sftprep.shards import write_bytes
from sfttrain.data.streaming import STATE_NAME as STREAM_STATE_NAME

if TYPE_CHECKING:
    from sfttrain.checkpoints.contents import ExpectedTensors

STATE_NAME = "sft_state.json"
SEAL_NAME = "sft_files.json"
TRAINER_STATE_NAME = "trainer_state.json"
INCOMPLETE_NAME = "sft_incomplete"
"""Written before all other files of a folder, and removed after the seal. It names the files of
others that were in the folder, with their times and sizes."""
_FOREIGN_MARK = "checkpoint-is-incomplete.txt"
"""transformers writes it before a checkpoint, and removes it after."""
_CHUNK = 1 << 24

_STATES: dict[str, dict[str, type]] = {
    TRAINER_STATE_NAME: {"global_step": int, "max_steps": int, "log_history": list},
    STATE_NAME: {"data": str, "packs_per_step": int, "seed": int},
}
"""Files that every checkpoint has, with fields that a resume reads."""

# Files of which one is enough; the first is named where none is there. The others are those of
# FSDP and DeepSpeed ("latest").
_OPTIMIZER = (
    ("optimizer.pt", "optimizer.bin", "optimizer_0", "latest"),
    ("scheduler.pt", "scheduler_0", "latest"),
)
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SHARDED = ("pytorch_model_fsdp_0", "pytorch_model_fsdp.bin", "latest")
_MODEL = ("model.safetensors", "pytorch_model.bin", *_INDEXES, *_SHARDED)
_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin", *_SHARDED)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a run must find in a checkpoint to resume from it."""

    ranks: int = 1
    """Processes of the run; used where the checkpoint does not say how many have saved it."""
    stream: bool = False
    """Whether it trains on a stream, whose position each process saves."""
    adapter: bool = False
    """Whether it trains an adapter and not the whole model."""
    optimizer: bool = True
    """Whether checkpoints hold the optimizer and the random states; not with save_only_model."""
    tensors: ExpectedTensors | None = None
    """Tensors of the model file; None where the model is not loaded yet."""


def seal_checkpoint(folder: str | Path) -> None:
    """Write the size and digest of each file in a checkpoint; the last thing that is written."""
    root = Path(folder)
    others = _read_fields(root / INCOMPLETE_NAME).get("others")
    files = {
        name: {"bytes": path.stat().st_size, "xxh3": _digest(path)}
        for name, path in files_in(root).items()
        if name not in (SEAL_NAME, INCOMPLETE_NAME, _FOREIGN_MARK)
        and not (isinstance(others, dict) and _is_unchanged(path, others.get(name)))
    }
    write_bytes(root / SEAL_NAME, json.dumps({"files": files}, indent=1).encode())
    (root / INCOMPLETE_NAME).unlink(missing_ok=True)


def _is_unchanged(path: Path, stamp: Any) -> bool:
    """Whether a file has the time and size that the marker names."""
    return bool(stamp == [path.stat().st_mtime_ns, path.stat().st_size])


def sealed_names(folder: Path) -> set[str]:
    """Return the names of the files in a seal; none without a valid one."""
    files = _read_fields(folder / SEAL_NAME).get("files")
    return {str(name) for name in files} if isinstance(files, dict) else set()


def saved_fault(folder: Path) -> str:
    """Return what is wrong with a checkpoint that a run of ours has saved; '' if nothing is.

    It says nothing of a checkpoint without a seal of an older version.
    """
    try:
        if os.path.lexists(folder / SEAL_NAME):
            return _seal_fault(folder)
    except OSError as error:
        return f"{os.path.basename(str(error.filename or folder))} cannot be read"
    return _torn_fault(folder)


def _torn_fault(folder: Path) -> str:
    if os.path.lexists(folder / INCOMPLETE_NAME) and not os.path.lexists(folder / SEAL_NAME):
        return f"its run was ended while it was saved ({INCOMPLETE_NAME})"
    return ""


def fault_of(folder: Path, needs: Needs, *, read: bool) -> str:
    """Return what is wrong with a checkpoint; '' for a complete one.

    Args:
        folder: the checkpoint.
        needs: what the run that resumes must find in it.
        read: check the content of all files; otherwise only that they are there.
    """
    try:
        return _first_fault(folder, needs, read)
    except OSError as error:  # a dangling or looping link, a file that may not be read
        name = os.path.basename(str(error.filename or folder))
        return f"{name} cannot be read: {error.strerror or error}"


def _first_fault(folder: Path, needs: Needs, read: bool) -> str:
    if fault := _torn_fault(folder) or _state_fault(folder, needs) or _step_fault(folder):
        return fault
    if os.path.lexists(folder / SEAL_NAME):
        return _seal_fault(folder) if read else ""
    missing = next(_missing_files(folder, needs), "")
    if missing or not read:
        return f"{missing} is missing" if missing else ""
    logger.warning(
        "%s has no %s: it is of an older version; reading all of its files",
        *(folder, SEAL_NAME),
    )
    faults = {name: _file_fault(path) for name, path in files_in(folder).items()}
    if fault := next((f"{name} {fault}" for name, fault in faults.items() if fault), ""):
        return fault
    from sfttrain.checkpoints.contents import contents_fault

    step = int(_read_fields(folder / TRAINER_STATE_NAME)["global_step"])
    steps = _read_fields(folder / STATE_NAME).get("steps")
    recorded = {
        str(name): count
        for name, count in (steps.items() if isinstance(steps, dict) else ())
        if isinstance(count, int)
    }
    return contents_fault(folder, step, recorded, needs.tensors)


def _step_fault(folder: Path) -> str:
    """Where a checkpoint is named by another step than its state: a copy, or files of several."""
    named = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    step = _read_fields(folder / TRAINER_STATE_NAME).get("global_step")
    if named and int(named[1]) != step:
        return f"{TRAINER_STATE_NAME} is of step {step}"
    return ""


def _state_fault(folder: Path, needs: Needs) -> str:
    """What is wrong with the optimizer and the states, which every checkpoint must have."""
    if (folder / _FOREIGN_MARK).exists():
        return f"transformers marked it as incomplete ({_FOREIGN_MARK})"
    for names in _OPTIMIZER if needs.optimizer else ():
        if not _has_one(folder, names):
            return f"{names[0]} is missing"
    faults = (_fields_fault(folder / name, fields) for name, fields in _STATES.items())
    return next(filter(None, faults), "")


def _missing_files(folder: Path, needs: Needs) -> Iterator[str]:
    """The files that a resume needs and that are not there, of a checkpoint without a seal."""
    weights: tuple[str, ...] = _MODEL
    places = [folder]
    if needs.adapter or (folder / "adapter_config.json").is_file():
        weights = _ADAPTER
        # An adapter that is not the default one is in a folder of its own.
        places += [path.parent for path in folder.glob("*/adapter_config.json")]
    if not any(_has_one(place, weights) for place in places):
        yield weights[0]
    for name in _INDEXES:
        shards = _read_fields(folder / name).get("weight_map")
        if isinstance(shards, dict):
            names = sorted({str(shard) for shard in shards.values()})
            yield from (shard for shard in names if not (folder / shard).is_file())
    ranks = _ranks_of(folder / STATE_NAME)
    if needs.optimizer:
        yield from _missing_random_states(folder, ranks, needs.ranks)
    if needs.stream:
        ranks = ranks or _ranks_of(folder / STREAM_STATE_NAME.format(rank=0)) or 1
        names_of_ranks = (STREAM_STATE_NAME.format(rank=rank) for rank in range(ranks))
        for name in names_of_ranks:
            if not {"ranks", "state"} <= _read_fields(folder / name).keys():
                yield name


def _missing_random_states(folder: Path, ranks: int, ranks_now: int) -> Iterator[str]:
    """The random states that are not there.

    Args:
        ranks: processes of the run that saved them; 0 if unknown, as in older versions.
        ranks_now: processes of this run, which are taken for those where they are unknown.
    """
    alone = "rng_state.pth"
    if not ranks and (folder / alone).is_file():
        return
    if not ranks:
        # Several processes may have saved the checkpoint that one process resumes from.
        ranks = max(ranks_now, 2 if any(folder.glob("rng_state_*.pth")) else 1)
    for rank in range(ranks):
        name = alone if ranks == 1 else f"rng_state_{rank}.pth"
        if not (folder / name).is_file():
            yield name


def _ranks_of(path: Path) -> int:
    """The number of processes that a state names; 0 if it names none."""
    ranks = _read_fields(path).get("ranks")
    return ranks if isinstance(ranks, int) else 0


def _has_one(folder: Path, names: tuple[str, ...]) -> bool:
    return any((folder / name).exists() for name in names)


def _read_fields(path: Path) -> dict[str, Any]:
    """The fields of a JSON object; none where the file has none."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _fields_fault(path: Path, fields: Mapping[str, type]) -> str:
    """What is wrong with a file that must hold these fields; '' if nothing is."""
    if not path.is_file():
        return f"{path.name} is missing"
    values = _read_fields(path)
    if not values:
        return f"{path.name} is empty or cut short"
    wrong = [name for name, kind in fields.items() if not isinstance(values.get(name), kind)]
    return f"{path.name} has no valid {wrong[0]}" if wrong else ""


def _seal_fault(folder: Path) -> str:
    try:
        files = json.loads((folder / SEAL_NAME).read_bytes())["files"]
        sealed = {str(name): (entry["bytes"], entry["xxh3"]) for name, entry in files.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        sealed = {}
    if not _STATES.keys() <= sealed.keys():  # every seal names at least these
        return f"{SEAL_NAME} is damaged"
    present = files_in(folder)
    for name, (size, digest) in sealed.items():
        if name not in present:
            return f"{name} is missing"
        if present[name].stat().st_size != size:
            return f"{name} has another size than was written"
        if _digest(present[name]) != digest:
            return f"{name} is damaged: its content is not what was written"
    return ""


def files_in(folder: Path) -> dict[str, Path]:
    """Return the files below a folder by their paths in it, sorted."""
    files = sorted(Path(root, name) for root, _, names in os.walk(folder) for name in names)
    return {path.relative_to(folder).as_posix(): path for path in files}


def _digest(path: Path) -> str:
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
    return state.hexdigest()


def _file_fault(path: Path) -> str:
    """What is wrong with a file of which no digest is known, read in full; '' if nothing is."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(str(path), framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  # it is not a dictionary
                    tensors.get_tensor(name)
        elif path.suffix in (".pt", ".pth", ".bin"):
            # torch writes zip files, with a checksum of each member. They may be pickles, and are
            # not loaded to be checked.
            with zipfile.ZipFile(path) as archive:
                member = archive.testzip()
            return f"is damaged at {member}" if member else ""
        else:
            _digest(path)
    except Exception as error:  # whatever its format says of a damaged file
        return f"cannot be read: {(str(error).splitlines() or [type(error).__name__])[0][:200]}"
    return ""
