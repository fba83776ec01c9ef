"""Which checkpoint a run goes on from, and whether it is one of the same run."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from sftprep.errors import ConfigError, InputNotFound, MismatchError

STATE_NAME = "sft_state.json"


@dataclass(frozen=True)
class RunState:
    """What a checkpoint keeps beside transformers' own files, so that going on is exact: counters
    and identities, no data.

    data: digest of the shards' manifest ('' for data without one); packs_per_step, seed: what
    decides which packs a step trains on; trained_tokens: targets seen so far, over all ranks.
    """

    data: str
    packs_per_step: int
    seed: int
    trained_tokens: int = 0

    def save(self, folder: str | Path) -> None:
        """Write into a checkpoint folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / STATE_NAME).write_text(
            json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8"
        )

    @classmethod
    def load(cls, folder: str | Path) -> RunState | None:
        """Read from a checkpoint folder; None where there is none, or none that can be read."""
        try:
            return cls(**json.loads((Path(folder) / STATE_NAME).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def must_continue(self, before: RunState, folder: str) -> None:
        """Raise MismatchError where going on from `before` would repeat packs or leave some out."""
        if before.data != self.data:
            raise MismatchError(
                f"{folder} was trained on other shards",
                remedy=(
                    "give the shards it was trained on, or start anew without"
                    " --resume_from_checkpoint"
                ),
            )
        if before.packs_per_step != self.packs_per_step:
            raise MismatchError(
                f"{folder} was trained with {before.packs_per_step} packs a step, and this run has"
                f" {self.packs_per_step}",
                remedy=(
                    "keep per_device_train_batch_size * gradient_accumulation_steps * processes as"
                    " it was"
                ),
            )
        if before.seed != self.seed:
            raise MismatchError(
                f"{folder} was trained in the order of seed {before.seed}, and this run has"
                f" {self.seed}",
                remedy=f"give --seed {before.seed}",
            )


def find_checkpoint(asked: str | bool, output_dir: str) -> str:
    """The folder to go on from. asked: a folder, or True | "true" | "latest" for the newest
    complete one in output_dir.

    Raises InputNotFound where there is none, ConfigError where the folder given is cut short.
    """
    if not (asked is True or str(asked).lower() in ("true", "latest")):
        missing = _missing_in(Path(str(asked)))
        if not Path(str(asked)).is_dir():
            raise InputNotFound(
                f"there is no checkpoint {asked}",
                remedy="give a folder such as OUTPUT_DIR/checkpoint-500, or latest",
            )
        if missing:
            raise ConfigError(
                f"{asked} is no complete checkpoint: {missing}",
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
        missing = _missing_in(found[step])
        if not missing:
            return str(found[step])
        skipped.append(f"{found[step].name} ({missing})")
    raise InputNotFound(
        f"{output_dir} holds no complete checkpoint"
        + (f"; skipped {', '.join(skipped)}" if skipped else ""),
        remedy="start without --resume_from_checkpoint",
    )


def _missing_in(folder: Path) -> str:
    """What a checkpoint lacks to go on exactly; '' for a complete one. A run killed while it saved
    leaves such folders."""
    for name in ("optimizer.pt", "scheduler.pt"):
        sharded = (
            folder / name.replace(".pt", "_0"),
            folder / "latest",
        )  # FSDP and DeepSpeed have other files
        if not (folder / name).is_file() and not any(path.exists() for path in sharded):
            return f"{name} is missing"
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "trainer_state.json is missing or cut short"
    return ""
