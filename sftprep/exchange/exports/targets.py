"""The formats of an export: the columns of each, and what it cannot express.

A new format is one entry of `TARGETS`, and the lines for it in `scripts.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from sftprep.errors import ConfigError, setting
from sftprep.exchange.exports.mds_files import MdsFiles
from sftprep.exchange.exports.parquet_files import ParquetFiles
from sftprep.exchange.exports.rows import (
    Row,
    complete_row,
    find_targets,
    packed_row,
    sequence_rows,
    shifted_row,
    weighted_row,
)
from sftprep.shards.manifest import Manifest
from sftprep.shards.reading.pack import Pack


class RowWriter(Protocol):
    """A writer of the rows of one split."""

    def add(self, row: Row) -> None:
        """Add a row."""

    def close(self) -> None:
        """Write what is left, and make the files durable."""

    def abort(self) -> None:
        """Release what is open; the files are incomplete."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A format of an export.

    Attributes:
        name: The value of `--to`.
        to_rows: Returns the rows of a pack.
        open_writer: Opens a writer to the folder of a split.
        has_data_card: Whether `datasets` reads the files, so that the README lists them.
        keeps_weights: Whether the format has a column for the loss weights of tokens.
        check: Raises an error if the format cannot express a pack.
    """

    name: str
    to_rows: Callable[[Pack], Iterable[Row]]
    open_writer: Callable[[Path], RowWriter]
    has_data_card: bool
    keeps_weights: bool
    check: Callable[[Pack, Manifest], None] = field(default=lambda _pack, _manifest: None)


def check_weights(pack: Pack, target: Target) -> None:
    """Check that a format without weights loses none of a pack.

    Raises:
        ConfigError: The pack has a trained token with a weight other than 1.
    """
    if target.keeps_weights or pack.loss_weights is None:
        return
    weights = pack.loss_weights[find_targets(pack)]
    if (weights != 1).any():
        weight = float(weights[weights != 1][0])
        raise ConfigError(
            f"the build has tokens of weight {weight:g} in the loss, which the format of"
            f" {target.name} cannot express",
            remedy=[
                f"export it with {setting('to', 'hf')}, which has a column of weights",
                "build again from records without weights of messages",
            ],
        )


def _check_end_tokens(pack: Pack, manifest: Manifest) -> None:
    """Check that no target follows an end token.

    Megatron-Bridge computes no loss where the input is the end token of the tokenizer, since it
    pads with this token.

    Raises:
        ConfigError: The pack has such a target.
    """
    end = manifest.tokenizer.get("eos_token_id")
    targets = find_targets(pack)[1:]
    if end is not None and (targets & (pack.input_ids[:-1] == end)).any():
        raise ConfigError(
            f"the build trains tokens that follow the end token {end} in a sequence, and"
            " Megatron-Bridge computes no loss for them",
            remedy=[
                f"build with {setting('train_on', 'assistant')}, which does not train them",
                f"export it with {setting('to', 'hf')} for another trainer",
            ],
        )


def _parquet(**columns: pa.DataType) -> Callable[[Path], RowWriter]:
    return lambda folder: ParquetFiles(folder, columns)


_INT32, _INT8, _FLOAT32 = pa.int32(), pa.int8(), pa.float32()

TARGETS = {
    target.name: target
    for target in (
        Target(
            name="trl",
            to_rows=lambda pack: (packed_row(pack),),
            open_writer=_parquet(input_ids=_INT32, labels=_INT32, seq_lengths=_INT32),
            has_data_card=True,
            keeps_weights=False,
        ),
        Target(
            name="hf",
            to_rows=lambda pack: (complete_row(pack),),
            open_writer=_parquet(
                input_ids=_INT32,
                position_ids=_INT32,
                labels=_INT32,
                completion_mask=pa.bool_(),
                loss_weights=_FLOAT32,
                seq_lengths=_INT32,
            ),
            has_data_card=True,
            keeps_weights=True,
        ),
        Target(
            name="megatron-bridge",
            to_rows=lambda pack: (shifted_row(pack),),
            open_writer=lambda folder: ParquetFiles(
                folder,
                {"input_ids": _INT32, "loss_mask": _INT8, "seq_start_id": _INT32},
                suffix=".idx.parquet",
            ),
            has_data_card=False,
            keeps_weights=False,
            check=_check_end_tokens,
        ),
        Target(
            name="mds",
            to_rows=lambda pack: (weighted_row(pack),),
            open_writer=lambda folder: MdsFiles(
                folder,
                {
                    "input_ids": np.dtype(np.int32).name,
                    "labels": np.dtype(np.int32).name,
                    "loss_weights": np.dtype(np.float32).name,
                    "seq_lengths": np.dtype(np.int32).name,
                },
            ),
            has_data_card=False,
            keeps_weights=True,
        ),
        Target(
            name="axolotl",
            to_rows=sequence_rows,
            open_writer=_parquet(input_ids=_INT32, attention_mask=_INT8, labels=_INT32),
            has_data_card=True,
            keeps_weights=False,
        ),
    )
}
"""The formats by their names."""
