"""Builds and packs as rows: columns by name, slices, and data sets of the library `datasets`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftprep import Pack, Shards, build, open_shards
from tests.pipeline.group_inputs import GROUP_BYTES, write
from tests.shards.builds import write_build
from tests.shards.layouts import COLUMNS, build_layout, write_tokens

SLICES = st.slices(6).filter(lambda each: each.step is None or each.step > 0)


@pytest.fixture(scope="module")
def folder(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds of both layouts."""
    root = tmp_path_factory.mktemp("columns")
    source = write_tokens(root / "rows.jsonl", [(11, 0.5), (30, 1.0), (52, 0.2)] * 5)
    for layout in ("packs", "sequences"):
        build_layout(layout, root, source, tokenizer=tokenizer_dir)
    return root


@pytest.fixture(params=["packs", "sequences"])
def shards(request: pytest.FixtureRequest, folder: Path) -> Shards:
    return open_shards(folder / request.param)


def values_of(pack: Pack) -> dict[str, Any]:
    return {name: values.tolist() for name, values in pack.columns().items()}


def test_a_column_of_a_pack_has_its_name(shards: Shards) -> None:
    pack = shards[0]
    assert list(pack.columns()) == [name for name in COLUMNS if getattr(pack, name) is not None]
    assert all(pack[name] is getattr(pack, name) for name in pack.columns())
    with pytest.raises(KeyError, match="no column 'labels', but input_ids"):
        pack["labels"]
    with pytest.raises(KeyError, match="loss_weights"):
        pack["loss_weights"]
    with pytest.raises(TypeError, match="0 is neither the name of a column"):
        pack[0]  # type: ignore[call-overload]


@settings(deadline=None)
@given(key=SLICES)
def test_a_slice_of_a_pack_has_these_sequences(key: slice) -> None:
    lengths = [2, 1, 3, 1, 1, 4]
    ends = np.cumsum(lengths)
    tokens = np.arange(ends[-1], dtype=np.int32)
    pack = Pack(
        tokens, tokens, tokens % 2 == 0, np.array(lengths, np.int32), np.arange(6), tokens / 2
    )
    sequences = [range(end - length, end) for length, end in zip(lengths, ends, strict=True)][key]
    expected = [int(token) for sequence in sequences for token in sequence]
    part = pack[key]
    assert part.input_ids.tolist() == part.position_ids.tolist() == expected
    assert part.completion_mask.tolist() == [token % 2 == 0 for token in expected]
    assert part.loss_weights is not None
    assert part.loss_weights.tolist() == [token / 2 for token in expected]
    assert part.seq_lengths.tolist() == lengths[key]
    assert part.origin.tolist() == list(range(6))[key]
    assert part.flags is None
    assert {name: each.dtype for name, each in part.columns().items()} == {
        name: each.dtype for name, each in pack.columns().items()
    }


def test_a_slice_of_sequences_has_no_step_backwards(shards: Shards) -> None:
    with pytest.raises(ValueError, match="step"):
        shards[0][::-1]


def test_a_slice_of_a_build_is_a_list_of_packs(shards: Shards) -> None:
    packs = list(shards)
    for key in (slice(2, 4), slice(-2, None), slice(None, None, -1), slice(5, 1), slice(99, 200)):
        assert [values_of(pack) for pack in shards[key]] == [values_of(pack) for pack in packs[key]]


@pytest.mark.parametrize("key", [[1, 2], None, np.array([1]), 1.5, (0, 1), True, b"0"])
def test_other_keys_of_a_build_are_refused(shards: Shards, key: Any) -> None:
    with pytest.raises(TypeError, match="an integer, a slice, or the name of a column, not by"):
        shards[key]
    with pytest.raises(TypeError, match="by an integer or a slice, not by"):
        shards["input_ids"][key]


@pytest.mark.parametrize("key", [np.int64(1), np.uint8(1), np.int32(-1)])
def test_integers_of_numpy_are_indices(shards: Shards, key: Any) -> None:
    expected = shards[int(key)].input_ids
    assert np.array_equal(shards[key].input_ids, expected)
    assert np.array_equal(shards["input_ids"][key], expected)


def test_a_representation_of_one_sequence_and_a_negative_origin(shards: Shards) -> None:
    assert repr(shards[0][:1]).endswith(" 1 sequence)")
    with pytest.raises(IndexError, match="-1 is not an origin"):
        shards.manifest.locate(-1)


def test_a_column_of_a_build_has_an_array_for_each_pack(shards: Shards) -> None:
    column = shards["input_ids"]
    assert len(column) == len(shards)
    assert [ids.tolist() for ids in column] == [pack.input_ids.tolist() for pack in shards]
    assert [ids.tolist() for ids in column[-2:]] == [
        pack.input_ids.tolist() for pack in shards[-2:]
    ]
    assert shards["loss_weights"][0] is None
    with pytest.raises(IndexError):
        column[len(shards)]
    with pytest.raises(KeyError, match="no column 'text', but input_ids"):
        shards["text"]


def test_a_representation_names_the_sizes(shards: Shards, folder: Path) -> None:
    assert repr(shards[0]).startswith(f"Pack({len(shards[0].input_ids)} tokens, ")
    assert repr(shards[0]).endswith(f" {len(shards[0].seq_lengths)} sequences)")
    manifest = shards.manifest
    assert repr(shards) == (
        f"Shards('{shards.root}', {len(shards)} packs of up to 64 tokens,"
        f" {manifest.tokens} tokens, {manifest.trained_tokens} trained)"
    )
    assert repr(shards["origin"]) == f"PackColumn('origin' of {shards!r})"


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_has_the_packs_in_their_order(
    shards: Shards, tmp_path: Path, streaming: bool
) -> None:
    data = shards.to_hf(streaming=streaming, **({} if streaming else {"cache_dir": str(tmp_path)}))
    assert list(data.features) == list(shards.column_types)
    assert [row["input_ids"] for row in data] == [pack.input_ids.tolist() for pack in shards]
    row = next(iter(data))
    assert {name: row[name] for name in shards[0].columns()} == values_of(shards[0])


def test_datasets_copies_each_build_once(folder: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    def files(**settings: Any) -> list[dict[str, str]]:
        shards = open_shards(folder / "sequences", **settings)
        list(shards)  # what an object has read so far has no effect
        found: list[dict[str, str]] = shards.to_hf(cache_dir=str(tmp_path / "cache")).cache_files
        return found

    assert files() == files()
    assert files() != files(max_length=128)


def test_packs_without_weights_have_none_where_others_have_them(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    chat = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    weighted = [chat[0], {**chat[1], "loss_weight": 0.5}]
    path = write(tmp_path / "a.jsonl", [{"messages": chat}] * 900 + [{"messages": weighted}])
    build(
        path,
        tokenizer=tokenizer_dir,
        output=tmp_path / "o",
        train_on="assistant",
        max_length=128,
        group_bytes=GROUP_BYTES,
        workers=1,
    )
    shards = open_shards(tmp_path / "o")
    expected = [None if each is None else each.tolist() for each in shards["loss_weights"]]
    assert None in expected
    assert any(expected)
    data = shards.to_hf(cache_dir=str(tmp_path / "cache"))
    assert data["loss_weights"][:] == expected


def test_position_ids_that_are_not_stored_are_computed(tmp_path: Path) -> None:
    write_build(tmp_path / "b", [[4, 4], [3]], position_ids=False)
    data = open_shards(tmp_path / "b").to_hf(cache_dir=str(tmp_path / "cache"))
    assert data["position_ids"][0] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert data.features["position_ids"].feature.dtype == "uint16"
