"""Builds on disk, written by sftprep's own writer, from packs in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sftprep.shards.layout import MANIFEST_NAME, SHARD_FOLDER
from sftprep.shards.ledger import Ledger
from sftprep.shards.manifest import Manifest
from sftprep.shards.writer import ShardRows, write_shard
from tests.sfttrain.packs import MemoryPacks


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
    )
    max_length = max(len(p.input_ids) for p in parts)
    (folder / SHARD_FOLDER).mkdir(parents=True)
    info = write_shard(folder / SHARD_FOLDER, 0, rows, max_length=max_length, position_ids=True)
    manifest = Manifest(
        config={},
        config_digest="",
        tokenizer={
            "max_id": int(rows.input_ids.max()),
            "vocab_size": int(rows.input_ids.max()) + 1,
            **tokenizer,
        },
        chat_template=chat_template,
        encoder={},
        template={},
        inputs=(),
        accounting=Ledger(),
        plan={},
        max_length=max_length,
        rows=len(parts),
        tokens=len(rows.input_ids),
        trained_tokens=info.trained_tokens,
        shards=(info,),
        sftprep_version="0",
    )
    (folder / MANIFEST_NAME).write_bytes(manifest.to_json())
    return folder
