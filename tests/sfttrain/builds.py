"""Builds on disk, written by sftprep's own writer, from packs in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sftprep.shards.layout import SHARD_FOLDER
from sftprep.shards.ledger import Ledger
from sftprep.shards.writer import ShardRows, write_shard
from tests.sfttrain.packs import MemoryPacks
from tests.shards.builds import group_of, write_manifest


def write_build(
    folder: Path, packs: MemoryPacks, *, tokenizer: dict[str, Any], chat_template: str | None = None
) -> Path:
    """Write packs as a finished build. tokenizer: its entries in the manifest, except max_id."""
    parts = packs.packs
    lengths = np.concatenate([p.seq_lengths for p in parts])
    rows = ShardRows(
        input_ids=np.concatenate([p.input_ids for p in parts]),
        completion_mask=np.concatenate([p.completion_mask for p in parts]),
        seq_lengths=lengths,
        origin=np.arange(len(lengths), dtype=np.int64),
        pack_offsets=np.cumsum([0, *(len(p.seq_lengths) for p in parts)], dtype=np.int64),
        flags=np.zeros(len(lengths), np.uint8),
    )
    max_length = max(len(p.input_ids) for p in parts)
    key = "0" * 16
    (folder / SHARD_FOLDER / key).mkdir(parents=True)
    info = write_shard(
        folder / SHARD_FOLDER / key, 0, rows, max_length=max_length, position_ids=True
    )
    max_id = int(rows.input_ids.max())
    group = group_of(key, [info], max_length, inputs=(), max_id=max_id, accounting=Ledger())
    sizes = {"max_id": max_id, "vocab_size": max_id + 1}
    write_manifest(folder, [group], {**sizes, **tokenizer}, chat_template)
    return folder
