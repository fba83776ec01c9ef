"""Helpers for the tests of builds: the content of a build, and its accounting."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from sftprep import open_shards, read_manifest, verify


def content(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, with its bytes."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def origins(folder: Path) -> Counter[int]:
    """Return the number of sequences of each record in a build, by the origin of the record."""
    assert verify(folder).ok
    return Counter(int(origin) for pack in open_shards(folder) for origin in pack.origin)


def texts(folder: Path) -> list[tuple[int, ...]]:
    """Return the ids of every sequence, sorted."""
    found = []
    for pack in open_shards(folder):
        at = 0
        for length in pack.seq_lengths.tolist():
            found.append(tuple(pack.input_ids[at : at + length].tolist()))
            at += length
    return sorted(found)


def check_accounting(folder: Path) -> None:
    """Check that the accounting of each input balances, and that the sum is that of the build."""
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
