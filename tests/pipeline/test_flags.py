"""The flags of sequences, and the digest of the data of a build."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sftprep import build, open_shards, read_manifest
from sftprep.core.types import Flag
from sftprep.errors import ManifestError


@pytest.fixture
def flags_of(records: Any, tokenizer_dir: Path, tmp_path: Path) -> Any:
    """Builds records of 3 and about 40 words, and returns the flags of each record by its line."""

    def run(**settings: Any) -> dict[int, list[int]]:
        path = records([{"text": "a b c"}, {"text": "word " * 40}, {"text": "d e f"}])
        folder = build(path, tokenizer=tokenizer_dir, output=tmp_path / "o", **settings).folder
        shards, found = open_shards(folder), {}
        for index, pack in enumerate(shards):
            flags = [0] * len(pack.origin) if pack.flags is None else pack.flags.tolist()
            for sequence, flag in enumerate(flags):
                found.setdefault(shards.locate(index, sequence)[1], []).append(flag)
        return {line: sorted(flags) for line, flags in sorted(found.items())}

    return run


def test_whole_sequences_have_no_flags(flags_of: Any) -> None:
    assert flags_of(max_length=256) == {1: [0], 2: [0], 3: [0]}


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_truncated_sequence_is_flagged(flags_of: Any, side: str) -> None:
    found = flags_of(max_length=16, truncate_side=side)
    assert found == {1: [0], 2: [Flag.TRUNCATED], 3: [0]}


@pytest.mark.parametrize(
    "settings", [{"overlong": "split"}, {"packing": "bfd_split"}, {"packing": "wrapped"}]
)
def test_every_part_of_a_split_sequence_is_flagged(flags_of: Any, settings: Any) -> None:
    found = flags_of(max_length=32, **settings)
    assert len(found[2]) > 1
    assert set(found[2]) == {Flag.SPLIT}
    assert found[1] == [0]


def test_all_copies_but_the_first_are_flagged(
    records: Any, tokenizer_dir: Path, tmp_path: Path
) -> None:
    path = records([{"text": "a b c"}, {"text": "d e"}])
    source = {"inputs": [path], "repeat": 3}
    folder = build(
        sources=[source], tokenizer=tokenizer_dir, output=tmp_path / "o", max_length=64
    ).folder
    flags = Counter(flag for pack in open_shards(folder) for flag in pack.flags.tolist())  # type: ignore[union-attr]
    assert flags == {0: 2, Flag.REPEATED: 4}


def test_the_data_digest_depends_on_the_shards_alone(
    records: Any, tokenizer_dir: Path, tmp_path: Path
) -> None:
    path = Path(records([{"text": f"number {k}"} for k in range(20)]))
    settings = {"tokenizer": tokenizer_dir, "max_length": 64}
    one = build(path, output=tmp_path / "one", **settings).manifest
    other_path = Path(shutil.copy(path, tmp_path / "other.jsonl"))
    other = build(other_path, output=tmp_path / "two", **settings).manifest
    assert one.digest != other.digest
    assert one.data_digest == other.data_digest
    seeded = build(path, output=tmp_path / "three", **{**settings, "max_length": 32}).manifest
    assert seeded.data_digest != one.data_digest
    file = tmp_path / "one" / "manifest.json"
    file.write_text(file.read_text().replace(one.data_digest, "0" * 64))
    with pytest.raises(ManifestError, match="data_digest"):
        read_manifest(tmp_path / "one")
