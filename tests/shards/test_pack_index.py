"""The index of a group has the sizes of its packs, and damage to it is detected."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftprep.errors import ShardError
from sftprep.pipeline.verify import verify
from sftprep.shards.layout import GROUP_FOLDER
from sftprep.shards.pack_index import PackIndex
from sftprep.shards.reading.open_build import open_shards
from tests.shards.builds import write_build
from tests.shards.test_golden_builds import GOLDEN

PACKS = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=12)


@settings(deadline=None)
@given(packs=PACKS, data=st.data())
def test_sizes_are_those_of_the_packs(
    tmp_path_factory: pytest.TempPathFactory, packs: list[list[int]], data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("b")
    contents = write_build(root, packs, group_rows=5)
    wanted = data.draw(st.lists(st.integers(0, len(packs) - 1), max_size=9))
    found = open_shards(root).sizes(wanted)
    for row, number in enumerate(wanted):
        content = contents[number]
        targets = zip(content["completion_mask"], content["position_ids"], strict=True)
        assert found.tokens[row] == sum(packs[number])
        assert found.trained_tokens[row] == sum(bool(t and position) for t, position in targets)
        assert found.sequences[row] == len(packs[number])
        assert found.longest[row] == max(packs[number])
        assert found.sum_of_squares[row] == sum(n * n for n in packs[number])
        assert found.image_patches[row] == 0
    assert len(found) == len(wanted)


def test_large_lengths_do_not_overflow() -> None:
    length = 100_000
    index = PackIndex.of(np.ones(length, np.bool_), np.array([length], np.int32), np.array([0, 1]))
    assert index.sum_of_squares.tolist() == [length**2]
    assert index.trained_tokens.tolist() == [length - 1]


def test_the_sizes_of_a_build_before_version_2_are_counted_in_its_shards() -> None:
    shards = open_shards(GOLDEN / "format-1.1")
    found = shards.sizes(range(len(shards)))
    assert found.tokens.tolist() == [len(pack.input_ids) for pack in shards]
    assert int(found.trained_tokens.sum()) == shards.manifest.trained_tokens


@pytest.mark.parametrize("damage", ["changed", "cut", "missing", "longer"])
def test_a_damaged_index_is_an_error(damage: str, tmp_path: Path) -> None:
    write_build(tmp_path / "b", [[3, 2], [4]])
    (path,) = (tmp_path / "b" / GROUP_FOLDER).glob("*.index")
    content = path.read_bytes()
    changed = {
        "changed": content.replace(b"\x0d\0\0\0\0\0\0\0", b"\x0e\0\0\0\0\0\0\0"),
        "cut": content[:-9],
        "longer": content + b"\0",
    }
    path.unlink() if damage == "missing" else path.write_bytes(changed[damage])
    shards = open_shards(tmp_path / "b")
    assert len([*shards]) == 2  # the packs themselves are readable
    with pytest.raises(ShardError, match=r"\.index"):
        shards.sizes([0])
    assert [problem for problem in verify(tmp_path / "b").problems if ".index" in problem]


def test_an_index_without_a_pack_is_an_error_where_one_is_asked_for(tmp_path: Path) -> None:
    write_build(tmp_path / "b", [[1]])
    shards = open_shards(tmp_path / "b")
    for wanted in ([1], [-1]):
        with pytest.raises(IndexError):
            shards.sizes(wanted)
