"""What the tests of builds share: small builds, and what is in them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from sftprep import open_shards, read_manifest, verify


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def origins(folder: Path) -> Counter[int]:
    """How often the sequences of each record stand in a build, by the record's ordinal."""
    assert verify(folder).ok
    return Counter(int(origin) for pack in open_shards(folder) for origin in pack.origin)


def texts(folder: Path) -> list[tuple[int, ...]]:
    """The ids of every sequence, sorted."""
    found = []
    for pack in open_shards(folder):
        at = 0
        for length in pack.seq_lengths.tolist():
            found.append(tuple(pack.input_ids[at : at + length].tolist()))
            at += length
    return sorted(found)


def check_ledger(folder: Path) -> None:
    """The accounts of every input balance, and their sum is that of the build."""
    manifest = read_manifest(folder)
    summed: Counter[str] = Counter()
    for info in manifest.inputs:
        assert info.accounting.check() == []
        assert (info.accounting.lines, info.accounting.records) == (info.lines, info.records)
        summed.update(info.accounting.to_counts())
    assert type(manifest.accounting).from_counts(summed) == manifest.accounting
    assert manifest.accounting.trained_tokens == sum(
        shard.trained_tokens for shard in manifest.shards
    )
