"""Builds with exact packing contain every sequence; windows and streams refuse it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sftprep import BuildConfig, BuildReport, build, open_shards
from sftprep.errors import ConfigError
from sftprep.stream import open_stream
from tests.conftest import EXAMPLES
from tests.pipeline.builds import content, origins, texts

CHATS = str(EXAMPLES / "data" / "chats.jsonl")


def run(tokenizer: Path, output: Path, **settings: object) -> BuildReport:
    """Build the chats of the examples."""
    chosen = {"inputs": CHATS, "max_length": 256, **settings}
    return build(BuildConfig.of(tokenizer=str(tokenizer), output=str(output), **chosen))


def test_a_build_with_exact_packing_has_the_sequences_of_best_fit(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    best_fit = run(tokenizer_dir, tmp_path / "bfd")
    exact = run(tokenizer_dir, tmp_path / "exact", packing="exact")
    assert texts(exact.folder) == texts(best_fit.folder)
    assert origins(exact.folder) == origins(best_fit.folder)
    assert exact.manifest.rows <= best_fit.manifest.rows
    assert exact.manifest.plan["strategy"] == "exact"
    assert max(int(pack.seq_lengths.sum()) for pack in open_shards(exact.folder)) <= 256
    again = run(tokenizer_dir, tmp_path / "again", packing="exact", workers=2)
    shards = [
        {name: data for name, data in content(folder).items() if name.endswith(".arrow")}
        for folder in (exact.folder, again.folder)
    ]
    assert shards[0] == shards[1]


def test_long_sequences_are_split_before_exact_packing(tokenizer_dir: Path, tmp_path: Path) -> None:
    report = run(tokenizer_dir, tmp_path / "a", packing="exact", overlong="split", max_length=64)
    assert report.manifest.plan["fill"] > 0.9
    assert origins(report.folder)


def test_windows_and_streams_are_refused_with_a_remedy(tokenizer_dir: Path) -> None:
    with pytest.raises(ConfigError, match="pack_window is not supported with") as caught:
        BuildConfig.of(packing="exact", pack_window=4_096)
    assert "leave out pack_window" in str(caught.value.remedy)
    with pytest.raises(ConfigError, match='packing="exact" is not supported by streams') as caught:
        open_stream(CHATS, tokenizer=str(tokenizer_dir), max_length=256, packing="exact")
    assert 'packing="bfd"' in str(caught.value.remedy)
