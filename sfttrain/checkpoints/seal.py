"""The check that a checkpoint is complete: all files with their content.

1. Sealed: `sft_files.json`, which is written last, has the size and digest of each file. The
   checkpoint is complete if its files have these digests.
2. `sft_incomplete` without a seal: the run ended while the checkpoint was being saved.
3. Neither (older versions): the files that a resume needs must exist; they are read in full and
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
from hashlib import file_digest
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
"""Written before all other files of a folder, and removed after the seal. It lists the user's files
that were in the folder, with their times and sizes."""
_TRANSFORMERS_MARK = "checkpoint-is-incomplete.txt"
"""transformers writes it before a checkpoint, and removes it afterwards."""

_STATES: dict[str, dict[str, type]] = {
    TRAINER_STATE_NAME: {"global_step": int, "max_steps": int, "log_history": list},
    STATE_NAME: {"data": str, "packs_per_step": int, "seed": int},
}
"""Files that every checkpoint has, with the fields that a resume reads and their types."""

# Alternative files, of which one is enough; the first is reported where all are missing. The later
# ones are those of FSDP and DeepSpeed ("latest").
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
    """The requirements of a run on the checkpoint for its resume."""

    ranks: int = 1
    """The number of processes; used where the checkpoint does not record how many saved it."""
    stream: bool = False
    """Whether the run trains on a stream, whose position each process saves."""
    adapter: bool = False
    """Whether the run trains an adapter and not the whole model."""
    optimizer: bool = True
    """Whether checkpoints hold the optimizer and the random states; not with save_only_model."""
    tensors: ExpectedTensors | None = None
    """The tensors of the model file; None where the model is not loaded yet."""


def seal_checkpoint(folder: str | Path) -> None:
    """Write the size and digest of each file of a checkpoint, after all were written."""
    root = Path(folder)
    others = read_fields(root / INCOMPLETE_NAME).get("others")
    files = {
        name: {"bytes": path.stat().st_size, "xxh3": _compute_digest(path)}
        for name, path in list_files(root).items()
        if name not in (SEAL_NAME, INCOMPLETE_NAME, _TRANSFORMERS_MARK)
        and path.is_file()  # pipes and devices of the user have no end
        and not (isinstance(others, dict) and _is_unchanged(path, others.get(name)))
    }
    write_bytes(root / SEAL_NAME, json.dumps({"files": files}, indent=1).encode())
    (root / INCOMPLETE_NAME).unlink(missing_ok=True)


def _is_unchanged(path: Path, stamp: Any) -> bool:
    """Return whether a file has the time and size listed in the marker."""
    return bool(stamp == [path.stat().st_mtime_ns, path.stat().st_size])


def read_sealed_names(folder: Path) -> set[str]:
    """Return the names of the files in a seal; an empty set without a valid seal."""
    files = read_fields(folder / SEAL_NAME).get("files")
    return {str(name) for name in files} if isinstance(files, dict) else set()


def _size_in(entry: Any) -> Any:
    """Return the size in an entry of a seal; None if it has none."""
    return entry.get("bytes") if isinstance(entry, dict) else None


def find_replaced(folder: Path) -> set[str]:
    """Return the names of sealed files with another size: the user replaced them."""
    files = read_fields(folder / SEAL_NAME).get("files")
    sizes = {
        str(name): _size_in(entry)
        for name, entry in (files if isinstance(files, dict) else {}).items()
    }
    paths = {name: folder / name for name in sizes}
    return {
        name
        for name, path in paths.items()
        if path.is_file() and sizes[name] != path.stat().st_size
    }


def find_saved_fault(folder: Path) -> str:
    """Return what is wrong with a checkpoint saved by sfttrain; "" if nothing is.

    Of a checkpoint of an older version, without a seal and without a marker, only the existence is
    checked.
    """
    if not folder.is_dir():
        return "it was deleted"
    try:
        if os.path.lexists(folder / SEAL_NAME):
            return _seal_fault(folder)
    except OSError as error:
        return f"{os.path.basename(str(error.filename or folder))} cannot be read"
    return _interrupted_fault(folder)


def _interrupted_fault(folder: Path) -> str:
    if os.path.lexists(folder / INCOMPLETE_NAME) and not os.path.lexists(folder / SEAL_NAME):
        return f"its run ended while it was being saved ({INCOMPLETE_NAME})"
    return ""


def find_fault(folder: Path, needs: Needs, *, check_content: bool) -> str:
    """Return what is wrong with a checkpoint; "" for a complete one.

    Args:
        folder: The checkpoint.
        needs: The requirements of the run that resumes.
        check_content: Whether to check the content of all files; otherwise only that they exist.
    """
    try:
        return _first_fault(folder, needs, check_content)
    except OSError as error:  # a dangling or looping link, or no permission to read a file
        name = os.path.basename(str(error.filename or folder))
        return f"{name} cannot be read: {error.strerror or error}"


def _first_fault(folder: Path, needs: Needs, check_content: bool) -> str:
    if fault := _interrupted_fault(folder) or _state_fault(folder, needs) or _step_fault(folder):
        return fault
    if os.path.lexists(folder / SEAL_NAME):
        fault = _seal_fault(folder) if check_content else ""
        # A file that was removed together with its entry in the seal is missing too.
        return fault or next((f"{name} is missing" for name in _missing_files(folder, needs)), "")
    missing = next(_missing_files(folder, needs), "")
    if missing or not check_content:
        return f"{missing} is missing" if missing else ""
    logger.warning(
        "%s has no %s, so an older version saved it: reading all of its files",
        *(folder, SEAL_NAME),
    )
    faults = {name: _file_fault(path) for name, path in list_files(folder).items()}
    if fault := next((f"{name} {fault}" for name, fault in faults.items() if fault), ""):
        return fault
    from sfttrain.checkpoints.contents import find_contents_fault

    step = int(read_fields(folder / TRAINER_STATE_NAME)["global_step"])
    steps = read_fields(folder / STATE_NAME).get("steps")
    recorded = {
        str(name): count
        for name, count in (steps.items() if isinstance(steps, dict) else ())
        if isinstance(count, int)
    }
    return find_contents_fault(folder, step, recorded, needs.tensors)


def _step_fault(folder: Path) -> str:
    """Return a contradiction between the name and the state of a checkpoint.

    A copied checkpoint can have one.
    """
    named = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    step = read_fields(folder / TRAINER_STATE_NAME).get("global_step")
    if named and int(named[1]) != step:
        return f"{TRAINER_STATE_NAME} is of step {step}"
    return ""


def _state_fault(folder: Path, needs: Needs) -> str:
    """Return what is wrong with the optimizer and the states of every checkpoint."""
    if (folder / _TRANSFORMERS_MARK).exists():
        return f"transformers marked it as incomplete ({_TRANSFORMERS_MARK})"
    for names in _OPTIMIZER if needs.optimizer else ():
        if not _has_one(folder, names):
            return f"{names[0]} is missing"
    faults = (_fields_fault(folder / name, fields) for name, fields in _STATES.items())
    return next(filter(None, faults), "")


def _missing_files(folder: Path, needs: Needs) -> Iterator[str]:
    """Yield the files needed for a resume and missing in a checkpoint."""
    # 1. The weights: of the model, or of an adapter.
    weights: tuple[str, ...] = _MODEL
    folders = [folder]
    if needs.adapter or (folder / "adapter_config.json").is_file():
        weights = _ADAPTER
        # peft saves an adapter that is not called "default" in a folder of its own.
        folders += [path.parent for path in folder.glob("*/adapter_config.json")]
    if not any(_has_one(candidate, weights) for candidate in folders):
        yield weights[0]
    # 2. All shards of an index.
    for name in _INDEXES:
        shards = read_fields(folder / name).get("weight_map")
        if isinstance(shards, dict):
            names = sorted({str(shard) for shard in shards.values()})
            yield from (shard for shard in names if not (folder / shard).is_file())
    # 3. The random states, and the positions in a stream, of each process that saved them.
    ranks = _read_ranks(folder / STATE_NAME)
    if needs.optimizer:
        yield from _missing_random_states(folder, ranks, needs.ranks)
    if needs.stream:
        ranks = ranks or _read_ranks(folder / STREAM_STATE_NAME.format(rank=0)) or 1
        state_names = (STREAM_STATE_NAME.format(rank=rank) for rank in range(ranks))
        for name in state_names:
            if not {"ranks", "state"} <= read_fields(folder / name).keys():
                yield name


def _missing_random_states(folder: Path, ranks: int, ranks_now: int) -> Iterator[str]:
    """Yield the missing files of random states.

    Args:
        ranks: The number of processes that saved them; 0 if unknown, as in older versions.
        ranks_now: The number of processes of this run, which is assumed if `ranks` is unknown.
    """
    single_name = "rng_state.pth"
    if not ranks and (folder / single_name).is_file():
        return
    if not ranks:
        # One process can resume from a checkpoint that several processes saved.
        ranks = max(ranks_now, 2 if any(folder.glob("rng_state_*.pth")) else 1)
    for rank in range(ranks):
        name = single_name if ranks == 1 else f"rng_state_{rank}.pth"
        if not (folder / name).is_file():
            yield name


def _read_ranks(path: Path) -> int:
    """Return the number of processes in a state; 0 if it is not recorded."""
    ranks = read_fields(path).get("ranks")
    return ranks if isinstance(ranks, int) else 0


def _has_one(folder: Path, names: tuple[str, ...]) -> bool:
    return any((folder / name).exists() for name in names)


def read_fields(path: Path) -> dict[str, Any]:
    """Return the fields of a JSON object; an empty dictionary if the file has none."""
    if not path.is_file():  # reading a pipe would not end
        return {}
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _fields_fault(path: Path, fields: Mapping[str, type]) -> str:
    """Return what is wrong with a file of required fields; "" if nothing is."""
    if not path.is_file():
        return f"{path.name} is missing"
    values = read_fields(path)
    if not values:
        return f"{path.name} is empty or cut short"
    wrong = [name for name, kind in fields.items() if not isinstance(values.get(name), kind)]
    return f"{path.name} has no valid {wrong[0]}" if wrong else ""


def _seal_fault(folder: Path) -> str:
    try:
        files = read_fields(folder / SEAL_NAME)["files"]
        sealed = {str(name): (entry["bytes"], entry["xxh3"]) for name, entry in files.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        sealed = {}
    if not _STATES.keys() <= sealed.keys():  # every seal has at least these
        return f"{SEAL_NAME} is damaged"
    present = list_files(folder)
    for name, (size, digest) in sealed.items():
        if name not in present:
            return f"{name} is missing"
        if not present[name].is_file():
            return f"{name} is not a regular file"
        if present[name].stat().st_size != size:
            return f"{name} does not have the size that was written"
        if _compute_digest(present[name]) != digest:
            return f"{name} is damaged: its content is not what was written"
    return ""


def list_files(folder: Path) -> dict[str, Path]:
    """Return the files in a folder and its subfolders by relative path, sorted."""
    files = sorted(Path(root, name) for root, _, names in os.walk(folder) for name in names)
    return {path.relative_to(folder).as_posix(): path for path in files}


def _compute_digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, xxhash.xxh3_128).hexdigest()


def _file_fault(path: Path) -> str:
    """Return what is wrong with a file of unknown digest; "" if nothing is."""
    if not path.is_file():  # reading a pipe or a device would not end
        return "is not a regular file"
    try:
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(str(path), framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  # it is not a dictionary
                    tensors.get_tensor(name)
        elif path.suffix in (".pt", ".pth", ".bin"):
            # torch writes zip files with a checksum of each member. They can contain pickles, so
            # they are not loaded.
            with zipfile.ZipFile(path) as archive:
                member = archive.testzip()
            return f"is damaged at {member}" if member else ""
        else:
            _compute_digest(path)
    except Exception as error:  # each format has its own errors for a damaged file
        return f"cannot be read: {(str(error).splitlines() or [type(error).__name__])[0][:200]}"
    return ""
