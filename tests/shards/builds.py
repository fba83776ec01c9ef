"""Builds of random packs, written without a tokenizer, and changes of their manifests."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sftprep.core.ragged import to_offsets
from sftprep.shards.group import Group, GroupEntry, InputInfo, ShardInfo
from sftprep.shards.json_fields import seal
from sftprep.shards.layout import GROUP_FOLDER, MANIFEST_NAME, SHARD_FOLDER, group_path
from sftprep.shards.ledger import Ledger
from sftprep.shards.manifest import FORMAT_VERSION, Manifest
from sftprep.shards.pack_index import PackIndex, write_index
from sftprep.shards.writer import ShardRows, write_shard

MAX_LENGTH = 16


def write_build(
    root: Path,
    packs: list[list[int]],
    *,
    shard_rows: int = 2,
    group_rows: int | None = None,
    position_ids: bool = True,
    max_length: int = MAX_LENGTH,
) -> list[dict[str, Any]]:
    """Write a build of random packs.

    Args:
        root: The folder.
        packs: The packs, as lists of sequence lengths.
        shard_rows: The number of packs in a shard.
        group_rows: The number of packs in a group; None for one group.
        position_ids: Whether to store position ids.
        max_length: The capacity of a pack.

    Returns:
        The content of each pack.
    """
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    groups = []
    for number, first in enumerate(range(0, len(packs), group_rows or len(packs))):
        own = packs[first : first + (group_rows or len(packs))]
        group, content = write_group(
            root, number, own, rng, shard_rows, position_ids=position_ids, max_length=max_length
        )
        rows += content
        groups.append(group)
    tokenizer = {
        "name": "t",
        "fingerprint": "f",
        "vocab_size": 100,
        "max_id": 99,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    write_manifest(root, groups, tokenizer)
    return rows


def write_manifest(
    root: Path, groups: list[Group], tokenizer: dict[str, Any], chat_template: str | None = None
) -> None:
    """Write the files of groups, whose shards are written, and the manifest of a build."""
    (root / GROUP_FOLDER).mkdir(exist_ok=True)
    entries, digests = [], sha256()
    for group in groups:
        digest = sha256(group.to_json()).hexdigest()
        (root / group_path(group.key, digest)).write_bytes(group.to_json())
        entries.append(GroupEntry.of(group, digest))
        for shard in group.shards:
            digests.update(bytes.fromhex(shard.sha256))
    manifest = Manifest(
        config={},
        config_digest="",
        tokenizer=tokenizer,
        chat_template=chat_template,
        encoder={},
        template={},
        accounting=Ledger.sum(group.accounting for group in groups),
        plan={},
        max_length=groups[0].max_length,
        rows=sum(group.rows for group in groups),
        tokens=sum(group.tokens for group in groups),
        trained_tokens=sum(group.trained_tokens for group in groups),
        sftprep_version="0",
        data_digest=digests.hexdigest(),
        groups=tuple(entries),
    )
    (root / MANIFEST_NAME).write_bytes(manifest.to_json())


def write_group(
    root: Path,
    number: int,
    packs: list[list[int]],
    rng: np.random.Generator,
    shard_rows: int,
    *,
    position_ids: bool,
    max_length: int,
) -> tuple[Group, list[dict[str, Any]]]:
    """Write the shards of a group; return it with the content of its packs."""
    key = f"{number:016x}"
    (root / SHARD_FOLDER / key).mkdir(parents=True)
    rows, infos, line, sizes = [], [], 0, []
    for index, first in enumerate(range(0, len(packs), shard_rows)):
        own = packs[first : first + shard_rows]
        seq_lengths = np.array([n for pack in own for n in pack], np.int32)
        total = int(seq_lengths.sum())
        shard = ShardRows(
            input_ids=rng.integers(0, 100, total, dtype=np.int32),
            completion_mask=rng.integers(0, 2, total).astype(bool),
            seq_lengths=seq_lengths,
            origin=np.arange(line, line + len(seq_lengths)),
            pack_offsets=np.concatenate(([0], np.cumsum([len(pack) for pack in own]))),
            flags=np.zeros(len(seq_lengths), np.uint8),
        )
        line += len(seq_lengths)
        info = write_shard(
            root / SHARD_FOLDER / key,
            index,
            shard,
            max_length=max_length,
            position_ids=position_ids,
        )
        infos.append(info)
        rows += contents(shard, own)
        sizes.append(PackIndex.of(shard.completion_mask, shard.seq_lengths, shard.pack_offsets))
    tokens, trained = sum(i.tokens for i in infos), sum(i.trained_tokens for i in infos)
    ledger = balanced(line, tokens, trained)
    inputs = (InputInfo("a.jsonl", 1, "", "text", line, line, accounting=ledger, slices=(line,)),)
    (root / GROUP_FOLDER).mkdir(exist_ok=True)
    index_digest = write_index(root, key, PackIndex.concatenate(sizes))
    group = group_of(
        key,
        infos,
        max_length,
        inputs=inputs,
        max_id=99,
        accounting=ledger,
        index_digest=index_digest,
    )
    return group, rows


def group_of(key: str, shards: list[ShardInfo], max_length: int, **fields: Any) -> Group:
    """Return a group with shards that were written to the folder of its key."""
    named = (dataclasses.replace(info, name=f"{key}/{info.name}") for info in shards)
    return Group(
        key=key,
        config_digest="",
        max_length=max_length,
        lengths={},
        source_lengths={},
        plan={},
        template={},
        shards=tuple(named),
        sftprep_version="0",
        format_version=FORMAT_VERSION,
        **fields,
    )


def balanced(sequences: int, tokens: int, trained: int) -> Ledger:
    """Return the ledger of records that each gave one sequence."""
    return Ledger(
        lines=sequences,
        records=sequences,
        sequences=sequences,
        tokens_in=tokens,
        tokens=tokens,
        trained_tokens=trained,
    )


def contents(shard: ShardRows, packs: list[list[int]]) -> list[dict[str, Any]]:
    """Return the content of each pack of a shard, as lists."""
    token_ends = to_offsets(np.array([sum(pack) for pack in packs])).tolist()
    return [
        {
            "input_ids": shard.input_ids[begin:end].tolist(),
            "completion_mask": shard.completion_mask[begin:end].tolist(),
            "position_ids": [k for n in pack for k in range(n)],
            "seq_lengths": pack,
            "origin": shard.origin[first:last].tolist(),
        }
        for pack, (begin, end), (first, last) in zip(
            packs, pairwise(token_ends), pairwise(shard.pack_offsets.tolist()), strict=True
        )
    ]


def write_sealed(path: Path, values: dict[str, Any]) -> None:
    """Write the values of a manifest with a checksum that fits."""
    values = {name: value for name, value in values.items() if name != "checksum"}
    path.write_bytes(seal(json.dumps(values, indent=1, sort_keys=True).encode()))


def rewritten(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest of a build with one group, and write it with digests that fit.

    Args:
        root: The folder of the build.
        change: Called with the values of the manifest, and with `inputs`, `shards` and
            `index_digest` of its group.
    """
    moved = ("inputs", "shards", "index_digest")
    values = json.loads((root / MANIFEST_NAME).read_bytes())
    entry = values["groups"][0]
    path = root / group_path(entry["key"], entry["digest"])
    group = json.loads(path.read_bytes())
    values |= {name: group.pop(name) for name in moved if name in group}
    change(values)
    group |= {name: values.pop(name) for name in moved if name in values}
    path.unlink()
    content = json.dumps(group).encode()
    entry["digest"] = sha256(content).hexdigest()
    (root / group_path(entry["key"], entry["digest"])).write_bytes(content)
    write_sealed(root / MANIFEST_NAME, values)
