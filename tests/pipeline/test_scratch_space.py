"""The spills of a group are removed when it is done, unless something may still need them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from sftprep import BuildReport, build, verify
from tests.pipeline.builds import content
from tests.pipeline.group_inputs import GROUP_BYTES, texts_of, write


class Runner:
    """Runs builds.

    Args:
        folder: The folder of their output folders.
        tokenizer: The folder of the tokenizer.

    Attributes:
        spills_seen: The number of spills at each written shard of the last build.
    """

    def __init__(self, folder: Path, tokenizer: Path) -> None:
        self._folder, self._tokenizer = folder, tokenizer
        self.spills_seen: list[int] = []

    def __call__(self, name: str, *inputs: str, **more: Any) -> Any:
        output = self._folder / name
        self.spills_seen = []

        def count_spills(stage: str, done: int, total: int) -> None:
            if stage == "write":
                self.spills_seen.append(len(spills(output)))

        settings = {"group_bytes": GROUP_BYTES, "max_length": 128, "workers": 1} | more
        return build(
            [*inputs] or None,
            tokenizer=self._tokenizer,
            encoder="tokenizers",
            output=output,
            progress=count_spills,
            **settings,
        )


@pytest.fixture
def run(tokenizer_dir: Path, tmp_path: Path) -> Runner:
    return Runner(tmp_path, tokenizer_dir)


def spills(output: Path) -> list[Path]:
    return sorted((output / "spill").glob("[0-9a-f]*.arrow"))


def files(report: BuildReport) -> dict[str, bytes]:
    found = content(report.folder)
    return {name: data for name, data in found.items() if not name.startswith("spill")}


def test_no_more_spills_than_those_of_one_group_exist(run: Runner, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", texts_of(2000))
    report = run("o", path)
    # A group has one slice here.
    assert run.spills_seen == [1] * len(report.manifest.groups) == [1] * 5
    assert verify(report.folder).ok
    kept = run("kept", path, keep_spill=True)
    assert run.spills_seen == [1, 2, 3, 4, 5]
    assert len(spills(kept.folder)) == 5
    assert files(kept) == files(report)


def test_the_spills_of_earlier_rounds_are_kept_for_the_last_one(
    run: Runner, tmp_path: Path
) -> None:
    sources = [
        {"path": write(tmp_path / f"{name}.jsonl", texts_of(900, 1, name)), "weight": 1}
        for name in "ab"
    ]
    report = run("o", sources=sources, duplicates="drop")
    groups = len(report.manifest.groups)
    assert report.reused == groups > 3
    assert run.spills_seen == [*range(groups, 0, -1)]


def test_equal_groups_and_evaluation_records_give_the_same_build(
    run: Runner, tmp_path: Path
) -> None:
    """Their partitions are equal, so they have the same spills."""
    inputs = [write(tmp_path / f"{name}.jsonl", texts_of(400)) for name in "abc"]
    evaluation = shutil.copy(inputs[0], tmp_path / "eval.jsonl")
    settings = {"eval_input": str(evaluation)}
    report = run("o", *inputs, **settings)
    kept = run("kept", *inputs, **settings, keep_spill=True)
    assert len(report.manifest.groups) >= 3
    assert files(report) == files(kept)
    assert verify(report.folder).ok
    assert verify(report.folder / "eval").ok


def test_a_part_keeps_its_spills(run: Runner, tmp_path: Path) -> None:
    """Another part may be reading the spill of an equal partition."""
    path = write(tmp_path / "a.jsonl", texts_of(2000))
    run("o", path, part="1/1")
    assert len(spills(tmp_path / "o")) == 5
    run("o", path)
    assert not (tmp_path / "o" / "spill").exists()
