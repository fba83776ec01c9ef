"""The loaders of other tools read exports, each in an environment of its own.

A variable names the Python interpreter that has the tool, for example
`SFTPREP_PYTHON_MDS=/tmp/mds/bin/python` after `pip install mosaicml-streaming` there.
"""

from __future__ import annotations

import json
import os
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import sftprep
from tests.exchange.contents import SPLITS, expected_packs, labelled_packs

pytestmark = pytest.mark.peer
SCRIPTS = Path(__file__).parent / "peers"


def read_with(tool: str, *arguments: object) -> list[Any]:
    """Run the script for a tool with its interpreter; return the lines of JSON that it prints."""
    variable = f"SFTPREP_PYTHON_{tool.upper()}"
    if variable not in os.environ:
        pytest.skip(f"{variable} names no interpreter with the tool")
    names = ("PYTHONPATH", "PYTHONHOME")
    done = subprocess.run(
        [os.environ[variable], str(SCRIPTS / f"read_{tool}.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={name: value for name, value in os.environ.items() if name not in names},
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("split", SPLITS)
def test_mosaicml_streaming_reads_the_packs(split: str, build: Path, tmp_path: Path) -> None:
    sftprep.export(build, to="mds", output=tmp_path / "out")
    assert labelled_packs(read_with("mds", tmp_path / "out" / split)) == expected_packs(
        build, split
    )


@pytest.mark.parametrize("split", SPLITS)
def test_axolotl_keeps_all_sequences(split: str, build: Path, tmp_path: Path) -> None:
    sftprep.export(build, to="axolotl", output=tmp_path / "out")
    rows = read_with("axolotl", tmp_path / "out", split, 128)
    for row in rows:
        assert row["position_ids"] == list(range(len(row["input_ids"])))
        assert row["attention_mask"] == [1] * len(row["input_ids"])
    expected = [[sequence] for pack in expected_packs(build, split) for sequence in pack]
    lengths = [{**row, "seq_lengths": [row["length"]]} for row in rows]
    assert labelled_packs(lengths) == expected


@pytest.mark.parametrize("split", SPLITS)
def test_megatron_bridge_predicts_all_targets(split: str, build: Path, tmp_path: Path) -> None:
    sftprep.export(build, to="megatron-bridge", output=tmp_path / "out")
    end = sftprep.read_manifest(build).tokenizer["eos_token_id"]
    batches = read_with("megatron_bridge", tmp_path / "out" / split, 128, end)
    expected = expected_packs(build, split)
    assert len(batches) == len(expected)
    for batch, sequences in zip(batches, expected, strict=True):
        # Each sequence is the inputs all but the last token, and the labels all but the first.
        assert batch["tokens"] == [t for ids, _, _ in sequences for t in ids[:-1]]
        assert batch["labels"] == [t for ids, _, _ in sequences for t in ids[1:]]
        assert batch["loss_mask"] == [int(t) for _, targets, _ in sequences for t in targets[1:]]
        lengths = [len(ids) - 1 for ids, _, _ in sequences]
        assert [last - first for first, last in pairwise(batch["cu_seqlens_q"])] == lengths
        assert batch["position_ids"] == [n for length in lengths for n in range(length)]
