"""Packs that are planned while reading are those that a build of layout `packs` stores."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sftprep import open_shards, read_manifest, verify
from sftprep.config import BuildConfig
from sftprep.errors import ConfigError, ManifestError, ShardError
from sftprep.report.verification import verification_lines
from sftprep.shards.layout import group_path, index_path
from sftprep.shards.pack_index import write_index_content
from sftprep.shards.reading import planned_shards
from sftprep.shards.reading.planned_shards import PlannedShards
from sftprep.shards.sequences import schema
from sftprep.shards.sequences.index import index_bytes, read_sequence_index
from sftprep.shards.sequences.sequence_file import SequenceFile
from tests.shards.builds import write_sealed
from tests.shards.layouts import assert_same_packs, build_layout, open_both, write_tokens
from tests.support import thorough

SIZES = st.lists(st.tuples(st.integers(2, 90), st.sampled_from([0.02, 0.3, 1.0])), min_size=8)


@settings(
    max_examples=thorough(150, default=20),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    sizes=SIZES,
    max_length=st.integers(8, 100),
    packing=st.sampled_from(["bfd", "exact", "wrapped", "none"]),
    overlong=st.sampled_from(["truncate", "split", "drop"]),
    seed=st.integers(0, 2**64 - 1),
    of_build=st.fixed_dictionaries(
        {
            "order": st.sampled_from(["shuffle", "keep"]),
            "truncate_side": st.sampled_from(["left", "right"]),
            "shard_tokens": st.sampled_from([None, 200]),
        }
    ),
)
def test_packs_of_any_settings_are_those_of_a_build(
    tokenizer_dir: Path,
    sizes: list[tuple[int, float]],
    max_length: int,
    packing: str,
    overlong: str,
    seed: int,
    of_build: dict[str, Any],
) -> None:
    requested: dict[str, Any] = {"max_length": max_length, "packing": packing, "seed": seed}
    requested["overlong"] = "truncate" if packing == "wrapped" else overlong
    more = {"tokenizer": tokenizer_dir, **of_build}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # A record of two trained tokens, which no limit cuts: a build needs a usable one.
        source = write_tokens(folder / "a.jsonl", [*sizes, (2, 1.0)])
        build_layout("packs", folder, source, **more, **requested)
        build_layout("sequences", folder, source, **more)  # with other settings than `requested`
        assert_same_packs(*open_both(folder, **requested))


@pytest.fixture(scope="module")
def folder(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both layouts, of several groups and shards."""
    folder = tmp_path_factory.mktemp("layouts")
    draw = np.random.default_rng(0)
    sizes = [(int(size), 0.5) for size in draw.integers(2, 90, 700)]
    source = write_tokens(folder / "a.jsonl", sizes)
    for layout in ("packs", "sequences"):
        build_layout(
            layout, folder, source, tokenizer=tokenizer_dir, group_bytes=1 << 16, shard_tokens=2000
        )
    return folder


def test_a_build_has_several_groups_and_shards(folder: Path) -> None:
    manifest = read_manifest(folder / "sequences")
    assert manifest.layout == "sequences"
    assert len(manifest.groups) > 2
    assert manifest.num_shards > 2 * len(manifest.groups)
    assert_same_packs(*open_both(folder))


def test_plans_of_groups_are_kept_up_to_a_number(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[str] = []
    plan_group = planned_shards.plan_group

    def spy(index: Any, settings: Any, group: Any) -> Any:
        planned.append(group.key)
        return plan_group(index, settings, group)

    monkeypatch.setattr(planned_shards, "plan_group", spy)
    shards = open_shards(folder / "sequences")
    assert planned == []
    first, last = 0, len(shards) - 1
    for index in (first, last, first, last):
        shards[index]
    assert len(planned) == 2
    monkeypatch.setattr(planned_shards, "MOST_OPEN_GROUPS", 1)
    shards = open_shards(folder / "sequences")
    for index in (first, last, first, last):
        assert shards[index].input_ids.tolist()
    assert len(planned) == 6


def test_it_is_a_sequence_of_packs_that_can_be_pickled(folder: Path) -> None:
    shards = open_shards(folder / "sequences", max_length=40, seed=3)
    assert isinstance(shards, PlannedShards)
    again = pickle.loads(pickle.dumps(shards))
    assert again.plan_settings == shards.plan_settings
    assert again.plan_settings["max_length"] == 40
    np.testing.assert_array_equal(again[-1].input_ids, shards[len(shards) - 1].input_ids)
    with pytest.raises(IndexError):
        shards[len(shards)]
    with pytest.raises(IndexError):
        shards.seq_lengths(-len(shards) - 1)
    assert open_shards(folder / "packs").plan_settings == {}


def test_a_shard_is_one_table_of_sequences(folder: Path, tmp_path: Path) -> None:
    import datasets

    root = folder / "sequences"
    files = [str(root / "shards" / info.name) for info in read_manifest(root).shards]
    rows = datasets.load_dataset(
        "arrow", data_files=files, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert rows.column_names == ["input_ids", "completion_mask", "origin", "flags"]
    records = [json.loads(line) for line in (folder / "a.jsonl").read_text().splitlines()]
    # Whole, in the order of the records, apart from those that train nothing.
    expected = [r["input_ids"] for r in records if any(t >= 0 for t in r["labels"][1:])]
    assert [row["input_ids"] for row in rows] == expected
    assert max(map(len, expected)) > read_manifest(root).max_length


def test_blocks_depend_on_lengths_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "BLOCK_TOKENS", 10)
    assert schema.block_offsets(np.array([4, 4, 4, 30, 1, 9, 2])).tolist() == [0, 3, 4, 6, 7]
    assert schema.block_offsets(np.array([], np.int32)).tolist() == [0]


# --- what cannot work -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ({"max_length": 32}, "max_length=64, not 32"),
        ({"seed": 1}, "seed=0, not 1"),
        ({"packing": "none"}, 'packing="bfd", not none'),
        ({"overlong": "drop"}, 'overlong="truncate", not drop'),
    ],
)
def test_stored_packs_cannot_be_planned_again(
    folder: Path, requested: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        open_shards(folder / "packs", **requested)
    assert 'layout="sequences"' in str(caught.value)
    assert len(open_shards(folder / "packs", max_length=64, seed=0)) > 0


@pytest.mark.parametrize(
    "requested",
    [
        {"max_length": 1},
        {"packing": "best"},
        {"overlong": "error"},
        {"seed": -1},
        {"packing": "wrapped", "overlong": "drop"},
    ],
)
def test_invalid_settings_are_refused(folder: Path, requested: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        open_shards(folder / "sequences", **requested)
    assert caught.value.remedy


@pytest.mark.parametrize("more", [{"overlong": "error"}, {"pack_window": 100}])
def test_settings_that_need_packs_while_building_are_refused(more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match='layout="sequences"'):
        BuildConfig.of(inputs="a", tokenizer="t", output="o", layout="sequences", **more)
    with pytest.raises(ConfigError, match="layout"):
        BuildConfig.of(layout="rows")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "columns"}, "has the layout 'columns'; this sftprep reads packs and sequences"),
        ({"layout": 3}, "layout"),
        ({"config": {}}, "invalid settings of the packing"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    copy = shutil.copytree(folder / "sequences", tmp_path / "copy")
    path = copy / "manifest.json"
    write_sealed(path, {**json.loads(path.read_bytes()), **changes})
    with pytest.raises(ManifestError, match=message):
        open_shards(copy)


def damaged_copy(folder: Path, target: Path, pattern: str, at: int) -> Path:
    copy = shutil.copytree(folder / "sequences", target / "copy")
    path = sorted(copy.glob(pattern))[0]
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    return copy


@pytest.mark.parametrize(
    ("pattern", "at"),
    [("shards/*/*.arrow", 2000), ("shards/*/*.arrow", -40), ("groups/*.index", 9)],
)
def test_damage_is_an_error_and_no_other_pack(
    folder: Path, tmp_path: Path, pattern: str, at: int
) -> None:
    copy = damaged_copy(folder, tmp_path, pattern, at)
    with pytest.raises(ShardError, match=r"not what was written|damaged"):
        [*open_shards(copy)]


def test_a_missing_shard_is_found_when_a_build_is_opened(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder / "sequences", tmp_path / "copy")
    next((copy / "shards").rglob("*.arrow")).unlink()
    with pytest.raises(ShardError, match="is missing"):
        open_shards(copy)


def test_a_shard_with_other_lengths_than_its_index_is_refused(folder: Path, tmp_path: Path) -> None:
    """An index that is consistent with the manifest may still be that of other shards."""
    root = folder / "sequences"
    group = read_manifest(root).read_group(0)
    info = group.shards[0]
    lengths = read_sequence_index(root, group).tokens[: info.rows].copy()
    lengths[:2] += (1, -1)
    file = SequenceFile(root / "shards" / info.name, info, lengths, verify=True, checked=set())
    with pytest.raises(ShardError, match="does not have the lengths of the index"):
        file.read_block(0)


# --- verification ---------------------------------------------------------------------------------


def test_verification_checks_all_of_a_build(folder: Path) -> None:
    result = verify(folder / "sequences")
    assert result.problems == []
    manifest = read_manifest(folder / "sequences")
    assert (result.shards, result.groups) == (manifest.num_shards, len(manifest.groups))
    assert result.sequences == manifest.accounting.sequences
    assert result.tokens == manifest.accounting.tokens
    assert verify(folder / "sequences", quick=True).ok
    parts = [verify(folder / "sequences", part=f"{number}/2") for number in (1, 2)]
    assert all(part.ok for part in parts)
    assert sum(part.rows for part in parts) == result.rows
    assert "stored sequences" in verification_lines(result)[0]


@pytest.mark.parametrize("pattern", ["shards/*/*.arrow", "groups/*.index", "groups/*.json"])
@pytest.mark.parametrize("at", [300, -5])
def test_verification_finds_damage(folder: Path, tmp_path: Path, pattern: str, at: int) -> None:
    problems = verify(damaged_copy(folder, tmp_path, pattern, at)).problems
    name = pattern.rsplit("/", maxsplit=1)[-1].removeprefix("*")
    assert len(problems) == 1
    assert name in problems[0]


def test_verification_compares_an_index_with_its_shards(folder: Path, tmp_path: Path) -> None:
    """All digests fit, but the index says another origin than the shard."""
    copy = shutil.copytree(folder / "sequences", tmp_path / "copy")
    manifest = read_manifest(copy)
    group = manifest.read_group(0)
    index = read_sequence_index(copy, group)
    index.origin[:2] = index.origin[1::-1].copy()
    digest = write_index_content(copy, group.key, index_bytes([index]))
    changed = dataclasses.replace(group, index_digest=digest).to_json()
    new_digest = sha256(changed).hexdigest()
    (copy / group_path(group.key, new_digest)).write_bytes(changed)
    (copy / group_path(group.key, manifest.groups[0].digest)).unlink()
    (copy / index_path(group.key, group.index_digest)).unlink()
    values = json.loads((copy / "manifest.json").read_bytes())
    values["groups"][0]["digest"] = new_digest
    write_sealed(copy / "manifest.json", values)
    (problem,) = verify(copy).problems
    assert "its columns are not those of the index of its group" in problem


@pytest.mark.parametrize("name", ["packs", "tokens", "trained_tokens"])
def test_verification_plans_the_packs_that_a_manifest_counts(
    folder: Path, tmp_path: Path, name: str
) -> None:
    copy = shutil.copytree(folder / "sequences", tmp_path / "copy")
    values = json.loads((copy / "manifest.json").read_bytes())
    entry = values["groups"][0]
    entry[name] = [entry[name][0] + 1] if name == "packs" else entry[name] + 1
    values["rows" if name == "packs" else name] += 1
    write_sealed(copy / "manifest.json", values)
    (problem,) = verify(copy).problems
    assert "is not that of its file" in problem
