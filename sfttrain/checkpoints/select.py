"""Which checkpoint a run resumes from: a complete one, of the same run.

What makes a checkpoint complete is in `seal`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftprep.errors import ConfigError, InputNotFound, MismatchError
from sftprep.shards import write_bytes
from sfttrain.checkpoints.output_folders import checkpoints_in
from sfttrain.checkpoints.seal import STATE_NAME, TRAINER_STATE_NAME, Needs, fault_of

_ANY_RUN = Needs()

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunState:
    """What a checkpoint keeps in addition to transformers' own files, so that a resume is exact:
    counters and identities, no data.

    data: digest of the shards' manifest ('' for data without one); packs_per_step, seed: what
    decides which packs a step trains on; trained_tokens: targets seen so far, over all ranks; code:
    repository and commit of the code that --trust_remote_code ran, '' if none; ranks: processes
    that saved the checkpoint, 0 if unknown; steps: what the trainer, the optimizer and the schedule
    count; settings: those of optimizer and schedule, which a resume restores or not
    (`resumed_settings`). Older versions wrote neither of the last two.
    """

    data: str
    packs_per_step: int
    seed: int
    trained_tokens: int = 0
    code: str = ""
    ranks: int = 0
    steps: dict[str, int] = dataclasses.field(default_factory=dict)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

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


def find_checkpoint(
    asked: str | bool, output_dir: str, *, needs: Needs = _ANY_RUN, read: bool = True
) -> str:
    """Find the checkpoint to resume from.

    Args:
        asked: a folder, or True | "true" | "latest" for the newest complete one in output_dir.
        needs: what the run must find in a checkpoint.
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
        fault = fault_of(folder, needs, read=read)
        if fault:
            raise ConfigError(
                f"{asked} is not a complete checkpoint: {fault}",
                remedy="give an older one, or latest",
            )
        return str(asked)
    found = {step: path for step, path in checkpoints_in(output_dir).items() if path.is_dir()}
    skipped: list[str] = []
    for step in sorted(found, reverse=True):
        fault = fault_of(found[step], needs, read=read)
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
    state = json.loads((Path(folder) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    return int(state["global_step"])
