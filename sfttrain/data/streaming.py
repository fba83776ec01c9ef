"""Training on raw records while they are tokenized: the stream of a run, its loader, and its place
in a checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sftprep.errors import ConfigError, MismatchError, SftprepError
from sftprep.stream import PackedStream
from sftprep.torch import StreamLoader
from sfttrain.config.setting_names import DATASET_OF_STREAM, TrainerNames

if TYPE_CHECKING:
    pass

STATE_NAME = "stream_state-{rank}.json"


def is_stream(source: Any) -> bool:
    """Whether packs are made as they are trained on, so that nobody knows how many there are."""
    return isinstance(source, PackedStream)


class TrainLoader(StreamLoader[Any]):
    """A StreamLoader as transformers' Trainer takes it. At least one process tokenizes beside the
    training.

    Every pass ends with a whole optimizer step: where the batches of its last step are fewer than
    `gradient_accumulation_steps`, batches that train nothing follow. Trainer makes a step of so
    many batches only, and would add the gradients of a shorter rest to the next step.
    """

    def __init__(
        self, stream: PackedStream, args: Any, rows: int, collate: Callable[[list[Any]], Any]
    ) -> None:
        pin = args.dataloader_pin_memory and args.device.type == "cuda"
        super().__init__(
            stream,
            rows,
            (lambda packs: _pinned(collate(packs))) if pin else collate,
            workers=max(1, args.dataloader_num_workers),
        )
        self._accumulation = args.gradient_accumulation_steps

    def __iter__(self) -> Iterator[Any]:
        """The batches of a pass. Raises the errors of the stream, in the words of the trainer."""
        batches, count = super().__iter__(), 0
        try:
            while (batch := self._next(batches, first=count == 0)) is not None:
                count += 1
                yield batch
        except SftprepError as error:
            raise error.shown_by(TrainerNames("train_dataset", DATASET_OF_STREAM)) from error
        # All ranks have had the same number of batches, so they add the same number.
        for _ in range(-count % self._accumulation):
            yield self.collate([self.stream.padding()])

    def _next(self, batches: Iterator[Any], *, first: bool) -> Any:
        """The next batch, None at the end of the pass."""
        if not first:
            return next(batches, None)
        # The first one starts the workers, for which torch takes a number from the random state of
        # the training: a resumed run, that starts them in the middle of a pass, would go on with
        # other random numbers.
        with torch.random.fork_rng(devices=()):
            return next(batches, None)

    def save(self, folder: str | os.PathLike[str], rank: int, world: int) -> None:
        """Write where this rank stands into a checkpoint folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        state = {"ranks": world, "state": self.state_dict()}
        (Path(folder) / STATE_NAME.format(rank=rank)).write_text(
            json.dumps(state), encoding="utf-8"
        )

    def go_on(self, folder: str | os.PathLike[str]) -> None:
        """Stand where the ranks stood that wrote a checkpoint, however many. Raises
        MismatchError."""
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
        except (OSError, ValueError, KeyError) as error:
            raise MismatchError(
                f"{folder} does not tell where its stream stood: {error}",
                remedy=(
                    "go on from a checkpoint of a run with --stream, with the files of all its"
                    " ranks"
                ),
            ) from error
        self.load_state_dict(states)


def reject_evaluation(sources: Sequence[Any]) -> None:
    """Raise ConfigError where an evaluation set is a stream."""
    if any(is_stream(source) for source in sources):
        raise ConfigError(
            "an evaluation set is a stream, of which nobody knows the end",
            remedy="build it: sftprep build, or give its records",
        )


def _pinned(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch whose tensors can go to the device while the host does something else."""
    return {
        name: value.pin_memory() if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
