"""Builds of random packs, written without a tokenizer, and changes of their manifests."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sftprep.core.ragged import to_offsets
from sftprep.shards.group import Group, InputInfo, ShardInfo, group_file
from sftprep.shards.layout import GROUP_FOLDER, MANIFEST_NAME, SHARD_FOLDER
from sftprep.shards.ledger import Ledger
from sftprep.shards.manifest import FORMAT_VERSION, GroupEntry, Manifest, seal
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
    entries = []
    for number, first in enumerate(range(0, len(packs), group_rows or len(packs))):
        own = packs[first : first + (group_rows or len(packs))]
        group, content = write_group(
            root, number, own, rng, shard_rows, position_ids=position_ids, max_length=max_length
        )
        rows += content
        entries.append(entry_of(root, group))
    tokens = sum(entry.tokens for entry in entries)
    trained = sum(entry.trained_tokens for entry in entries)
    sequences = sum(map(len, packs))
    manifest = Manifest(
        config={},
        config_digest="",
        tokenizer={
            "name": "t",
            "fingerprint": "f",
            "vocab_size": 100,
            "max_id": 99,
            "eos_token_id": 1,
            "pad_token_id": 0,
        },
        chat_template=None,
        encoder={},
        template={},
        accounting=balanced(sequences, tokens, trained),
        plan={},
        max_length=max_length,
        rows=len(packs),
        tokens=tokens,
        trained_tokens=trained,
        sftprep_version="0",
        groups=tuple(entries),
        folder=root,
    )
    digests = b"".join(bytes.fromhex(shard.sha256) for shard in manifest.shards)
    values = json.loads(manifest.to_json())
    values["data_digest"] = sha256(digests).hexdigest()
    write_sealed(root / MANIFEST_NAME, values)
    return rows


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
    """Write the shards and the file of a group; return it with the content of its packs."""
    key = f"{number:016x}"
    (root / SHARD_FOLDER / key).mkdir(parents=True)
    (root / GROUP_FOLDER).mkdir(exist_ok=True)
    rows, infos, line = [], [], 0
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
        )
        line += len(seq_lengths)
        info = write_shard(
            root / SHARD_FOLDER / key,
            index,
            shard,
            max_length=max_length,
            position_ids=position_ids,
        )
        infos.append(ShardInfo(**{**fields_of(info), "name": f"{key}/{info.name}"}))
        rows += contents(shard, own)
    tokens, trained = sum(i.tokens for i in infos), sum(i.trained_tokens for i in infos)
    ledger = balanced(line, tokens, trained)
    group = Group(
        key=key,
        config_digest="",
        max_length=max_length,
        inputs=(
            InputInfo("a.jsonl", 1, "", "text", line, line, accounting=ledger, slices=(line,)),
        ),
        accounting=ledger,
        lengths={},
        plan={},
        template={},
        max_id=99,
        shards=tuple(infos),
        sftprep_version="0",
        format_version=FORMAT_VERSION,
    )
    group_file(root, key).write_bytes(group.to_json())
    return group, rows


def entry_of(root: Path, group: Group) -> GroupEntry:
    """Return the entry of a group, whose file is written."""
    return GroupEntry(
        key=group.key,
        digest=sha256(group_file(root, group.key).read_bytes()).hexdigest(),
        packs=array("q", [shard.rows for shard in group.shards]),
        tokens=group.tokens,
        trained_tokens=group.trained_tokens,
        bytes=sum(shard.bytes for shard in group.shards),
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


def fields_of(info: ShardInfo) -> dict[str, Any]:
    """Return the fields of the entry of a shard."""
    return {name: getattr(info, name) for name in info.__slots__}


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
        change: Called with the values of the manifest, and with the `inputs` and `shards` of its
            group.
    """
    values = json.loads((root / MANIFEST_NAME).read_bytes())
    entry = values["groups"][0]
    path = group_file(root, entry["key"])
    group = json.loads(path.read_bytes())
    values |= {name: group.pop(name) for name in ("inputs", "shards") if name in group}
    change(values)
    group |= {name: values.pop(name) for name in ("inputs", "shards") if name in values}
    path.write_text(json.dumps(group))
    if isinstance(values.get("groups"), list):
        entry["digest"] = sha256(path.read_bytes()).hexdigest()
    write_sealed(root / MANIFEST_NAME, values)
