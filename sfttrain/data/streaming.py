"""Training on raw records while they are tokenized: a loader and its saved state."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from sftprep.errors import ConfigError, MismatchError, SftprepError
from sftprep.stream import PackedStream
from sftprep.torch import StreamLoader
from sfttrain.config.setting_names import DATASET_OF_STREAM, StreamNames

STATE_NAME = "stream_state-{rank}.json"


def is_stream(source: Any) -> bool:
    """Return whether packs are made during training.

    Their number is not known then.
    """
    return isinstance(source, PackedStream)


class TrainLoader(StreamLoader[Any]):
    """StreamLoader for transformers' Trainer, with at least one tokenizing process.

    Every pass over the data ends with a complete optimizer step. If its last step has fewer batches
    than `gradient_accumulation_steps`, batches without a trained token follow. Without them,
    Trainer would add the gradients of the incomplete step to the first step of the next pass.
    """

    def __init__(
        self, stream: PackedStream, args: Any, rows: int, collate: Callable[[list[Any]], Any]
    ) -> None:
        """Create a loader.

        Args:
            stream: The packs of this rank.
            args: The SFTConfig of the run.
            rows: The number of packs in a device batch.
            collate: The function that joins packs into a batch.
        """
        pin = args.dataloader_pin_memory and args.device.type == "cuda"
        super().__init__(
            stream,
            rows,
            (lambda packs: _pin(collate(packs))) if pin else collate,
            workers=max(1, args.dataloader_num_workers),
        )
        self._accumulation = args.gradient_accumulation_steps

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches of a pass.

        Raises:
            SftprepError: Any error of the stream, which shows the settings of SFTConfig.
        """
        batches, count = super().__iter__(), 0
        try:
            while (batch := self._next_batch(batches, is_first=count == 0)) is not None:
                count += 1
                yield batch
        except SftprepError as error:
            raise error.shown_by(StreamNames("train_dataset", DATASET_OF_STREAM)) from error
        # All ranks had the same number of batches, so all ranks add the same number.
        for _ in range(-count % self._accumulation):
            yield self.collate([self.stream.padding()])

    def _next_batch(self, batches: Iterator[Any], *, is_first: bool) -> Any:
        """Return the next batch; None at the end of the pass."""
        if not is_first:
            return next(batches, None)
        # The first batch starts the workers, and torch draws their seed from the random state of
        # the training. A resumed run starts them in the middle of a pass and would continue with
        # other random numbers, so the random state is restored afterwards.
        with torch.random.fork_rng(devices=()):
            return next(batches, None)

    def save(self, folder: str | os.PathLike[str], rank: int, world: int) -> None:
        """Write the position of this rank in the stream to a checkpoint folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        state = {"ranks": world, "state": self.state_dict()}
        (Path(folder) / STATE_NAME.format(rank=rank)).write_text(
            json.dumps(state), encoding="utf-8"
        )

    def restore(self, folder: str | os.PathLike[str]) -> None:
        """Set the position to that of a checkpoint, written by any number of ranks.

        Raises:
            MismatchError: If the files are missing or damaged, or belong to another stream.
        """
        try:
            first = json.loads(
                (Path(folder) / STATE_NAME.format(rank=0)).read_text(encoding="utf-8")
            )
            states = [
                json.loads(
                    (Path(folder) / STATE_NAME.format(rank=rank)).read_text(encoding="utf-8")
                )["state"]
                for rank in range(first["ranks"])
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MismatchError(
                f"the position in the stream cannot be read from {folder}: {error}",
                remedy=(
                    "resume from a checkpoint of a run on a stream, with the state files of all its"
                    " ranks"
                ),
            ) from error
        self.load_state_dict(states)


def reject_evaluation(sources: Sequence[Any]) -> None:
    """Raise ConfigError if an evaluation set is a stream.

    The number of packs of a stream is not known.
    """
    if any(is_stream(source) for source in sources):
        raise ConfigError(
            "an evaluation set is a stream, whose length is not known",
            remedy=["build the evaluation set with `sftprep build`", "pass its records"],
        )


def _pin(batch: dict[str, Any]) -> dict[str, Any]:
    """Pin the tensors of a batch for asynchronous copies to the device."""
    return {
        name: value.pin_memory() if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
