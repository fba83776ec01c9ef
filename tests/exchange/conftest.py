"""A small build with held-out records, which all tests of exports read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import sftprep

CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {a} plus {b}?" + " Please." * (a % 3)},
            {"role": "assistant", "content": f"It is {a + b}."},
            {"role": "user", "content": "Thanks!"},
            {"role": "assistant", "content": "Of course. " * (b + 1)},
        ]
    }
    for a in range(8)
    for b in range(5)
]


@pytest.fixture(scope="package")
def build(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """The folder of a build of which the assistant's turns are trained."""
    return make_build(tmp_path_factory.mktemp("build"), tokenizer_dir, CHATS)


def make_build(folder: Path, tokenizer_dir: Path, rows: list[object], **settings: object) -> Path:
    source = folder / "chats.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    defaults = {"train_on": "assistant", "max_length": 128, "eval_fraction": 0.2, "workers": 1}
    sftprep.build(
        str(source), tokenizer=str(tokenizer_dir), output=folder / "b", **{**defaults, **settings}
    )
    return folder / "b"
