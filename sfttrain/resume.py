"""Which checkpoint a run resumes from: a complete one, of the same run.

A checkpoint is sealed when all of its files are written: `sft_files.json`, written last, has the
size and digest of each. A sealed checkpoint is complete if its files have these digests. One
without a seal (of an older version, or of a run that was killed at its end) is read in full.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from sftprep.errors import ConfigError, InputNotFound, MismatchError
from sftprep.shards.files import write_bytes

STATE_NAME = "sft_state.json"
SEAL_NAME = "sft_files.json"
_INCOMPLETE_NAME = "checkpoint-is-incomplete.txt"
"""transformers writes it before a checkpoint, and removes it after."""
_CHUNK = 1 << 24

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunState:
    """What a checkpoint keeps in addition to transformers' own files, so that a resume is exact:
    counters and identities, no data.

    data: digest of the shards' manifest ('' for data without one); packs_per_step, seed: what
    decides which packs a step trains on; trained_tokens: targets seen so far, over all ranks; code:
    repository and commit of the code that --trust_remote_code ran, '' if none.
    """

    data: str
    packs_per_step: int
    seed: int
    trained_tokens: int = 0
    code: str = ""

    def save(self, folder: str | Path) -> None:
        """Write into a checkpoint folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        content = json.dumps(dataclasses.asdict(self), indent=1) + "\n"
        write_bytes(Path(folder) / STATE_NAME, content.encode())

    @classmethod
    def load(cls, folder: str | Path) -> RunState:
        """Read from a checkpoint folder.

        Raises:
            MismatchError: there is none, so that nobody knows which packs the run was trained on.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        try:
            values = json.loads((Path(folder) / STATE_NAME).read_text(encoding="utf-8"))
            return cls(**{name: value for name, value in values.items() if name in known})
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise MismatchError(
                f"{folder} has no readable {STATE_NAME}, so it is not known which data it was "
                "trained on",
                remedy="resume from a checkpoint of sfttrain, or start a new run from its weights:"
                f" --model {folder}",
            ) from error

    def must_continue(self, before: RunState, folder: str) -> None:
        """Raise MismatchError where going on from `before` would repeat packs or leave some out."""
        if before.data != self.data:
            raise MismatchError(
                f"{folder} was trained on other shards",
                remedy="give the shards it was trained on, or start anew without"
                " --resume_from_checkpoint",
            )
        if before.packs_per_step != self.packs_per_step:
            raise MismatchError(
                f"{folder} was trained with {before.packs_per_step} packs a step, and this run has"
                f" {self.packs_per_step}",
                remedy="keep per_device_train_batch_size * gradient_accumulation_steps * processes"
                " as it was",
            )
        if before.seed != self.seed:
            raise MismatchError(
                f"{folder} was trained in the order of seed {before.seed}, and this run has"
                f" {self.seed}",
                remedy=f"give --seed {before.seed}",
            )


def is_asked(resume: Any) -> bool:
    """Whether a value of resume_from_checkpoint asks for a resume."""
    return bool(resume) and str(resume).lower() != "false"


def find_checkpoint(asked: str | bool, output_dir: str, *, read: bool = True) -> str:
    """Find the checkpoint to resume from.

    Args:
        asked: a folder, or True | "true" | "latest" for the newest complete one in output_dir.
        read: check all of its files; otherwise only that they are there, which takes no time.

    Raises:
        InputNotFound: there is none.
        ConfigError: the folder given is not complete.
    """
    if not (asked is True or str(asked).lower() in ("true", "latest")):
        folder = Path(str(asked))
        if not folder.is_dir():
            raise InputNotFound(
                f"there is no checkpoint {asked}",
                remedy="give a folder such as OUTPUT_DIR/checkpoint-500, or latest",
            )
        fault = _fault_of(folder, read=read)
        if fault:
            raise ConfigError(
                f"{asked} is not a complete checkpoint: {fault}",
                remedy="give an older one, or latest",
            )
        return str(asked)
    found = {
        int(p.name.rpartition("-")[2]): p
        for p in Path(output_dir).glob("checkpoint-*")
        if p.name.rpartition("-")[2].isdigit()
    }
    skipped: list[str] = []
    for step in sorted(found, reverse=True):
        fault = _fault_of(found[step], read=read)
        if not fault:
            if skipped and read:
                logger.warning(
                    "resuming from %s; not complete: %s", found[step].name, ", ".join(skipped)
                )
            return str(found[step])
        skipped.append(f"{found[step].name} ({fault})")
    raise InputNotFound(
        f"{output_dir} holds no complete checkpoint"
        + (f"; skipped {', '.join(skipped)}" if skipped else ""),
        remedy="start without --resume_from_checkpoint",
    )


def step_of_checkpoint(folder: str | Path) -> int:
    """Return the optimizer steps that a checkpoint was saved after."""
    state = json.loads((Path(folder) / "trainer_state.json").read_text(encoding="utf-8"))
    return int(state["global_step"])


def seal_checkpoint(folder: str | Path) -> None:
    """Write the size and digest of each file in a checkpoint; the last thing that is written."""
    root = Path(folder)
    files = {
        name: {"bytes": path.stat().st_size, "xxh3": _digest(path)}
        for name, path in _files_in(root).items()
        if name not in (SEAL_NAME, _INCOMPLETE_NAME)
    }
    write_bytes(root / SEAL_NAME, json.dumps({"files": files}, indent=1).encode())


def _fault_of(folder: Path, *, read: bool) -> str:
    """What is wrong with a checkpoint; '' for a complete one."""
    if (folder / _INCOMPLETE_NAME).exists():
        return f"transformers marked it as incomplete ({_INCOMPLETE_NAME})"
    for name in ("optimizer.pt", "scheduler.pt"):
        sharded = (
            folder / name.replace(".pt", "_0"),
            folder / "latest",
        )  # FSDP and DeepSpeed have other files
        if not (folder / name).is_file() and not any(path.exists() for path in sharded):
            return f"{name} is missing"
    for name in ("trainer_state.json", STATE_NAME):
        if _file_fault(folder / name):
            return f"{name} is missing or cut short"
    if not read:
        return ""
    if (folder / SEAL_NAME).exists():
        return _seal_fault(folder)
    logger.warning(
        "%s has no %s: it is of an older version, or its run was killed; reading all of its files",
        *(folder, SEAL_NAME),
    )
    faults = {name: _file_fault(path) for name, path in _files_in(folder).items()}
    return next((f"{name} {fault}" for name, fault in faults.items() if fault), "")


def _seal_fault(folder: Path) -> str:
    try:
        files = json.loads((folder / SEAL_NAME).read_bytes())["files"]
        sealed = {str(name): (entry["bytes"], entry["xxh3"]) for name, entry in files.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"{SEAL_NAME} is damaged"
    present = _files_in(folder)
    for name, (size, digest) in sealed.items():
        if name not in present:
            return f"{name} is missing"
        if present[name].stat().st_size != size:
            return f"{name} has another size than was written"
        if _digest(present[name]) != digest:
            return f"{name} is damaged: its content is not what was written"
    return ""


def _files_in(folder: Path) -> dict[str, Path]:
    """The files below a folder by their paths in it, sorted."""
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
