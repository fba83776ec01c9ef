"""Builds on disk, written by sftprep's own writer, from packs in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sftprep.shards.layout import GROUP_FOLDER, SHARD_FOLDER
from sftprep.shards.ledger import Ledger
from sftprep.shards.pack_index import PackIndex, write_index
from sftprep.shards.writer import ShardRows, write_shard
from tests.sfttrain.packs import MemoryPack, MemoryPacks
from tests.shards.builds import group_of, write_manifest


def write_build(
    folder: Path,
    packs: MemoryPacks,
    *,
    tokenizer: dict[str, Any],
    chat_template: str | None = None,
    shard_packs: int | None = None,
) -> Path:
    """Write packs as a finished build.

    Args:
        folder: The folder.
        packs: The packs.
        tokenizer: Its entries in the manifest, except max_id.
        chat_template: The chat template in the manifest.
        shard_packs: The number of packs in a shard; None for a single shard.
    """
    key, size = "0" * 16, shard_packs or len(packs)
    (folder / SHARD_FOLDER / key).mkdir(parents=True)
    (folder / GROUP_FOLDER).mkdir()
    max_length = max(len(p.input_ids) for p in packs.packs)
    infos, sizes, sequences, max_id = [], [], 0, 0
    for number, first in enumerate(range(0, len(packs), size)):
        rows = _to_rows(packs.packs[first : first + size], sequences)
        sequences += len(rows.seq_lengths)
        max_id = max(max_id, int(rows.input_ids.max()))
        sizes.append(PackIndex.of(rows.completion_mask, rows.seq_lengths, rows.pack_offsets))
        infos.append(
            write_shard(
                folder / SHARD_FOLDER / key,
                number,
                rows,
                max_length=max_length,
                position_ids=True,
            )
        )
    group = group_of(
        key,
        infos,
        max_length,
        inputs=(),
        max_id=max_id,
        accounting=Ledger(),
        index_digest=write_index(folder, key, PackIndex.concatenate(sizes)),
    )
    highest = {"max_id": max_id, "vocab_size": max_id + 1}
    write_manifest(folder, [group], {**highest, **tokenizer}, chat_template)
    return folder


def _to_rows(packs: list[MemoryPack], first_origin: int) -> ShardRows:
    lengths = np.concatenate([p.seq_lengths for p in packs])
    return ShardRows(
        input_ids=np.concatenate([p.input_ids for p in packs]),
        completion_mask=np.concatenate([p.completion_mask for p in packs]),
        seq_lengths=lengths,
        origin=first_origin + np.arange(len(lengths), dtype=np.int64),
        pack_offsets=np.cumsum([0, *(len(p.seq_lengths) for p in packs)], dtype=np.int64),
        flags=np.zeros(len(lengths), np.uint8),
    )
