"""Selection of the checkpoint for a resume: a complete one of the same run.

`seal` defines when a checkpoint is complete.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftprep.errors import ConfigError, InputNotFound, MismatchError, setting
from sftprep.shards import write_bytes
from sfttrain.checkpoints.output_folders import list_checkpoints
from sfttrain.checkpoints.seal import STATE_NAME, TRAINER_STATE_NAME, Needs, find_fault

_ANY_RUN = Needs()

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunState:
    """Counters and identities in a checkpoint, in addition to transformers' files.

    They make a resume exact: it trains on the packs that the interrupted run had not seen yet.
    """

    data: str
    """The digest of the shards; "" for data without one."""
    packs_per_step: int
    """With `seed` and `lanes`, this determines which packs each step trains on."""
    seed: int
    """The seed of the order of the packs."""
    lanes: int = 0
    """The number of shard lanes; 0 for packs in another order, and in older versions."""
    epoch: int = 0
    """The 0-based epoch of the next step."""
    position: int = -1
    """The position in the epoch at which the next step begins, in packs; -1 in older versions."""
    packing: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The settings of packs that are planned while they are read (layout `sequences`), by name."""
    build: str = ""
    """The folder of the shards, for messages; "" for other data, and in older versions."""
    trained_tokens: int = 0
    """The targets seen so far, over all ranks."""
    code: str = ""
    """The repository and commit of the code that trust_remote_code ran; "" if none."""
    ranks: int = 0
    """The number of processes that saved the checkpoint; 0 if unknown."""
    steps: dict[str, int] = dataclasses.field(default_factory=dict)
    """The steps that the trainer, the optimizer and the schedule count; older versions: empty."""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The settings of optimizer and schedule (`resumed_settings`); older versions: empty."""

    def save(self, folder: str | Path) -> None:
        """Write the state into the folder of a checkpoint."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        content = json.dumps(dataclasses.asdict(self), indent=1) + "\n"
        write_bytes(Path(folder) / STATE_NAME, content.encode())

    @classmethod
    def load(cls, folder: str | Path) -> RunState:
        """Read the state from the folder of a checkpoint.

        Raises:
            MismatchError: It has none, so the packs that it was trained on are unknown.
        """
        # Fields of newer versions are ignored.
        known = {field.name for field in dataclasses.fields(cls)}
        try:
            values = json.loads((Path(folder) / STATE_NAME).read_text(encoding="utf-8"))
            return cls(**{name: value for name, value in values.items() if name in known})
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise MismatchError(
                f"{folder} has no readable {STATE_NAME}, so it is not known which data it was "
                "trained on",
                remedy=[
                    "resume from a checkpoint of sfttrain",
                    f"start a new run from its weights: {setting('model', folder)}",
                ],
            ) from error

    def reject_other_run(self, state: RunState, folder: str) -> None:
        """Refuse to resume where the run would repeat packs or skip some.

        Args:
            state: The state of the checkpoint.
            folder: The checkpoint, for the message.

        Raises:
            MismatchError: The data, their packing, the packs per step or the seed differ.
        """
        if state.data != self.data:
            raise MismatchError(
                f"{folder} was trained on {state.data_name}, but this run has {self.data_name}",
                remedy=[
                    "use the data that it was trained on",
                    f"start a new run without {setting('resume_from_checkpoint')}",
                ],
            )
        self._reject_other_packing(state, folder)
        if state.packs_per_step != self.packs_per_step:
            raise MismatchError(
                f"{folder} was trained with {state.packs_per_step} packs per step, but this run"
                f" has {self.packs_per_step}",
                remedy=f"keep {setting('per_device_train_batch_size')} *"
                f" {setting('gradient_accumulation_steps')} * processes as it was",
            )
        if state.seed != self.seed:
            raise MismatchError(
                f"{folder} was trained in the order of seed {state.seed}, but this run has"
                f" {self.seed}",
                remedy=f"use {setting('seed', state.seed)}",
            )
        self._reject_other_order(state, folder)

    def _reject_other_packing(self, state: RunState, folder: str) -> None:
        for name in sorted(state.packing.keys() | self.packing.keys()):
            before, now = state.packing.get(name), self.packing.get(name)
            if before != now:
                raise MismatchError(
                    f"{folder} was trained on packs with {setting(name, before)}, but this run has"
                    f" {setting(name, now)}",
                    remedy=[
                        f"use {setting(name, before)}",
                        f"start a new run from its weights: {setting('model', folder)}",
                    ],
                )

    def _reject_other_order(self, state: RunState, folder: str) -> None:
        if bool(state.lanes) != bool(self.lanes):
            strategy = setting("train_sampling_strategy", "sequential" if self.lanes else "random")
            raise MismatchError(
                f"{folder} was trained on the packs in another order than that of this run: with"
                f" {strategy}, or by an earlier version",
                remedy=[
                    f"use {strategy}",
                    f"start a new run from its weights: {setting('model', folder)}",
                ],
            )
        if state.position >= 0 and (state.epoch, state.position) != (self.epoch, self.position):
            raise MismatchError(
                f"{folder} was saved at pack {state.position:,} of epoch {state.epoch}; in this"
                f" run, its step is at pack {self.position:,} of epoch {self.epoch}",
                remedy=f"keep the data and {setting('dataloader_drop_last')} as they were",
            )

    @property
    def data_name(self) -> str:
        """The name of the data in messages."""
        if not self.data:
            return "data without a digest"
        return f"{self.build or 'other data'} with the digest {self.data[:16]}"


def is_resume_requested(resume: Any) -> bool:
    """Return whether a value of resume_from_checkpoint requests a resume."""
    return bool(resume) and str(resume).lower() != "false"


def find_checkpoint(
    requested: str | bool, output_dir: str, *, needs: Needs = _ANY_RUN, check_content: bool = True
) -> str:
    """Find the checkpoint to resume from.

    Args:
        requested: A folder, or True, "true" or "latest" for the newest complete checkpoint in
            `output_dir`.
        output_dir: The output folder.
        needs: The requirements of the run on a checkpoint.
        check_content: Whether to check the content of all files; otherwise only that they exist,
            which takes no time.

    Raises:
        InputNotFound: No complete checkpoint exists.
        ConfigError: The requested folder is not complete.
    """
    if not (requested is True or str(requested).lower() in ("true", "latest")):
        folder = Path(str(requested))
        if not folder.is_dir():
            raise InputNotFound(
                f"the checkpoint {requested} does not exist",
                remedy="specify a folder such as OUTPUT_DIR/checkpoint-500, or latest",
            )
        fault = find_fault(folder, needs, check_content=check_content)
        if fault:
            raise ConfigError(
                f"{requested} is not a complete checkpoint: {fault}",
                remedy="specify an older one, or latest",
            )
        return str(requested)
    checkpoints = {
        step: path for step, path in list_checkpoints(output_dir).items() if path.is_dir()
    }
    skipped: list[str] = []
    for step in sorted(checkpoints, reverse=True):
        fault = find_fault(checkpoints[step], needs, check_content=check_content)
        if not fault:
            if skipped and check_content:
                logger.warning(
                    "resuming from %s; not complete: %s", checkpoints[step].name, ", ".join(skipped)
                )
            return str(checkpoints[step])
        skipped.append(f"{checkpoints[step].name} ({fault})")
    raise InputNotFound(
        f"{output_dir} has no complete checkpoint"
        + (f"; skipped {', '.join(skipped)}" if skipped else ""),
        remedy=f"start without {setting('resume_from_checkpoint')}",
    )


def read_step(folder: str | Path) -> int:
    """Return the number of optimizer steps before a checkpoint was saved."""
    state = json.loads((Path(folder) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    return int(state["global_step"])
