"""Packs are read as they were written, damage is detected, and `datasets` reads the shards."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftprep.errors import ManifestError, ShardError
from sftprep.pipeline.verify import verify
from sftprep.shards.group import Group, InputInfo
from sftprep.shards.layout import MANIFEST_NAME, SHARD_FOLDER
from sftprep.shards.ledger import Ledger
from sftprep.shards.manifest import read_manifest
from sftprep.shards.reading.open_build import open_shards
from sftprep.shards.writer import count_targets
from tests.shards.builds import rewritten, write_build

PACKS = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=7)


@settings(deadline=None)
@given(packs=PACKS, position_ids=st.booleans(), max_length=st.sampled_from([16, 70_000]))
def test_packs_are_read_as_they_were_written(tmp_path_factory, packs, position_ids, max_length):
    root = tmp_path_factory.mktemp("b")
    expected = write_build(root, packs, position_ids=position_ids, max_length=max_length)
    shards = open_shards(root)
    assert len(shards) == len(packs)
    for _ in range(2):
        for index in reversed(range(len(packs))):
            pack = shards[index]
            assert {name: getattr(pack, name).tolist() for name in expected[index]} == expected[
                index
            ]
            assert shards.seq_lengths(index).tolist() == packs[index]
    assert pack.position_ids.dtype == (np.uint16 if max_length <= 65_535 else np.int32)
    assert (pack.input_ids.dtype, pack.seq_lengths.dtype, pack.origin.dtype) == (
        np.int32,
        np.int32,
        np.int64,
    )
    assert verify(root).ok


def test_ids_are_views_of_the_file(tmp_path):
    write_build(tmp_path / "b", [[4, 4], [3]])
    shards = open_shards(tmp_path / "b")
    assert not shards[0].input_ids.flags.owndata
    assert not shards[0].input_ids.flags.writeable


def test_shards_are_indexed_like_a_sequence_and_can_be_pickled(tmp_path):
    expected = write_build(tmp_path / "b", [[1], [2], [3]])
    shards = pickle.loads(pickle.dumps(open_shards(tmp_path / "b")))
    assert shards[-1].input_ids.tolist() == expected[2]["input_ids"]
    assert [pack.seq_lengths.tolist() for pack in shards] == [[1], [2], [3]]
    for index in (3, -4):
        with pytest.raises(IndexError):
            shards[index]


def test_the_same_rows_give_the_same_file(tmp_path):
    write_build(tmp_path / "a", [[4, 4], [3]])
    write_build(tmp_path / "b", [[4, 4], [3]])
    assert read_manifest(tmp_path / "a").digest == read_manifest(tmp_path / "b").digest
    names = [
        [path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*")]
        for name in "ab"
    ]
    assert names[0] == names[1]


def test_the_first_token_of_a_sequence_is_not_a_target():
    assert count_targets(np.array([True, True, True, False, True]), np.array([2, 3], np.int32)) == 2
    assert count_targets(np.array([True]), np.array([0, 1, 0], np.int32)) == 0


@pytest.mark.parametrize("position_ids", [True, False])
def test_datasets_reads_the_shards(tmp_path, position_ids):
    datasets = pytest.importorskip("datasets")
    expected = write_build(tmp_path / "b", [[4, 4], [3], [2, 1]], position_ids=position_ids)
    files = str(tmp_path / "b" / "shards" / "*" / "*.arrow")
    loaded = datasets.load_dataset(
        "arrow", data_files=files, split="train", cache_dir=str(tmp_path / "cache")
    )
    columns = [name for name in expected[0] if position_ids or name != "position_ids"]
    assert sorted(loaded.column_names) == sorted([*columns, "flags"])
    assert [{name: row[name] for name in columns} for row in loaded] == [
        {n: row[n] for n in columns} for row in expected
    ]


def test_any_flipped_bit_is_an_error_that_names_the_shard(tmp_path):
    write_build(tmp_path / "b", [[4, 4], [3]])
    (path,) = (tmp_path / "b" / SHARD_FOLDER).rglob("*.arrow")
    whole = path.read_bytes()
    for at in range(0, len(whole), 97):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        with pytest.raises(ShardError, match=path.name):
            open_shards(tmp_path / "b")[0]
        assert any(path.name in problem for problem in verify(tmp_path / "b").problems)


def test_a_missing_or_cut_shard_is_an_error_when_it_is_opened(tmp_path):
    write_build(tmp_path / "b", [[4, 4], [3]])
    (path,) = (tmp_path / "b" / SHARD_FOLDER).rglob("*.arrow")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ShardError, match="bytes, not the"):
        open_shards(tmp_path / "b")
    path.unlink()
    with pytest.raises(ShardError, match="missing"):
        open_shards(tmp_path / "b")
    assert not verify(tmp_path / "b").ok


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda m: m["tokenizer"].update(vocab_size=10), "outside the vocabulary"),
        (lambda m: m.update(max_length=5), "more than 5"),
        (lambda m: m["inputs"][0].update(slices=[1]), "not a line of the inputs"),
        (lambda m: m["inputs"][0].update(lines=1), "the slices of a.jsonl have 3 lines, not 1"),
        (lambda m: m["accounting"].update(records=99), "does not balance"),
        (lambda m: m.update(data_digest="0"), "data_digest is not that of the shards"),
        (lambda m: m["groups"][0].update(packs=[2, 0]), "is not that of its file"),
        (lambda m: m["groups"][0].update(rejected="0" * 64), "is not what was written"),
        (lambda m: m.update(tokens=1), "tokens, the manifest says 1"),
        (lambda m: m.update(trained_tokens=0), "trained tokens"),
        (lambda m: m["shards"][0].update(sha256="0" * 64), "SHA-256"),
    ],
)
def test_verify_detects_inconsistencies(tmp_path, change, problem):
    write_build(tmp_path / "b", [[4, 4], [3]])
    rewritten(tmp_path / "b", change)
    found = verify(tmp_path / "b")
    assert not found.ok
    assert any(problem in text for text in found.problems), found.problems


@pytest.mark.parametrize(
    "name",
    [
        *("../../etc/passwd", "/etc/passwd", "shard-0.arrow"),
        *("shard-00000-0123456789abcdef.arrow/..", "shard-00000-0123456789abcdef.arrow\n"),
    ],
)
def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path, name):
    write_build(tmp_path / "b", [[1]])
    rewritten(tmp_path / "b", lambda m: m["shards"][0].update(name=name))
    with pytest.raises(ManifestError, match="tampered"):
        open_shards(tmp_path / "b")


def test_a_folder_that_is_not_a_build_is_an_error(tmp_path):
    with pytest.raises(ManifestError, match="does not exist"):
        open_shards(tmp_path / "none")
    with pytest.raises(ManifestError, match="no manifest"):
        open_shards(tmp_path)
    write_build(tmp_path / "b", [[1]])
    rewritten(tmp_path / "b", lambda m: m.update(format_version="3.0"))
    with pytest.raises(ManifestError, match=r"format version 3\.0"):
        open_shards(tmp_path / "b")
    rewritten(tmp_path / "b", lambda m: m.update(format_version="2.9", a_later_field=1))
    assert len(open_shards(tmp_path / "b")) == 1
    for text in ("{", "[]", "{}", '{"format_version": "1.0"}'):
        (tmp_path / "b" / MANIFEST_NAME).write_text(text)
        with pytest.raises(ManifestError):
            open_shards(tmp_path / "b")


def group_of(*inputs: InputInfo, version: str = "2.0") -> Group:
    return Group("", "", 1, inputs, Ledger(), {}, {}, {}, {}, 0, (), "0", version)


def test_an_origin_is_found_in_its_slice():
    group = group_of(
        *(
            InputInfo(path, 0, "", "text", sum(lines), sum(lines), slices=lines)
            for path, lines in [("a", (2, 1)), ("b", ()), ("c", (0, 2))]
        )
    )
    origins = [number << 44 | line for number, line in [(0, 0), (0, 1), (1, 0), (3, 0), (3, 1)]]
    expected = [("a", 1), ("a", 2), ("a", 3), ("c", 1), ("c", 2)]
    assert [group.locate(origin) for origin in origins] == expected
    for outside in (-1, 2, 1 << 44 | 1, 2 << 44, 3 << 44 | 2, 4 << 44):
        with pytest.raises(IndexError):
            group.locate(outside)


def test_an_ordinal_of_an_earlier_format_is_found_in_its_file():
    group = group_of(
        *(
            InputInfo(p, 0, "", "text", lines, lines, first)
            for p, first, lines in [("a", 0, 2), ("b", 2, 0), ("c", 2, 3)]
        ),
        version="1.1",
    )
    assert [group.locate(k) for k in range(5)] == [
        ("a", 1),
        ("a", 2),
        ("c", 1),
        ("c", 2),
        ("c", 3),
    ]
    for outside in (-1, 5):
        with pytest.raises(IndexError):
            group.locate(outside)
