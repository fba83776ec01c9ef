"""Builds on disk, written by sftprep's own writer, from packs in memory."""

from __future__ import annotations

import dataclasses
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from sftprep.shards.group import Group, group_file
from sftprep.shards.layout import GROUP_FOLDER, MANIFEST_NAME, SHARD_FOLDER
from sftprep.shards.ledger import Ledger
from sftprep.shards.manifest import FORMAT_VERSION, Manifest
from sftprep.shards.writer import ShardRows, write_shard
from tests.sfttrain.packs import MemoryPacks
from tests.shards.builds import entry_of


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
    key = "0" * 16
    (folder / SHARD_FOLDER / key).mkdir(parents=True)
    (folder / GROUP_FOLDER).mkdir()
    info = write_shard(
        folder / SHARD_FOLDER / key, 0, rows, max_length=max_length, position_ids=True
    )
    group = Group(
        key=key,
        config_digest="",
        max_length=max_length,
        inputs=(),
        accounting=Ledger(),
        lengths={},
        plan={},
        template={},
        max_id=int(rows.input_ids.max()),
        shards=(dataclasses.replace(info, name=f"{key}/{info.name}"),),
        sftprep_version="0",
        format_version=FORMAT_VERSION,
    )
    group_file(folder, key).write_bytes(group.to_json())
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
        accounting=Ledger(),
        plan={},
        max_length=max_length,
        rows=len(parts),
        tokens=len(rows.input_ids),
        trained_tokens=info.trained_tokens,
        sftprep_version="0",
        data_digest=sha256(bytes.fromhex(info.sha256)).hexdigest(),
        groups=(entry_of(folder, group),),
    )
    (folder / MANIFEST_NAME).write_bytes(manifest.to_json())
    return folder
