"""Segments of arrays, compared with slices of lists."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftprep.core.ragged import Ragged, replace_segments, to_offsets

several = st.lists(st.lists(st.integers(0, 255), max_size=5), max_size=8)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
@given(pieces=several, data=st.data())
def test_pieces_in_another_order(dtype: type, pieces: list[list[int]], data: st.DataObject) -> None:
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    flat = np.array([value for piece in pieces for value in piece], dtype)
    ragged: Ragged[np.int32] = Ragged(flat, to_offsets(lengths))
    assert (
        ragged.offsets.tolist()
        == to_offsets(np.array([len(piece) for piece in pieces], np.int64)).tolist()
    )
    which = data.draw(st.lists(st.integers(0, len(pieces) - 1), max_size=12)) if pieces else []
    taken = ragged.take(np.array(which, np.int64))
    assert taken.values.dtype == dtype
    assert taken.values.tolist() == [value for number in which for value in pieces[number]]
    assert np.diff(taken.offsets).tolist() == [len(pieces[number]) for number in which]


@given(pieces=several, data=st.data())
def test_some_segments_replaced(pieces: list[list[int]], data: st.DataObject) -> None:
    new = {
        number: data.draw(st.lists(st.integers(0, 255), max_size=3))
        for number in range(len(pieces))
        if data.draw(st.booleans())
    }
    flat = np.array([value for piece in pieces for value in piece], np.int32)
    offsets = to_offsets(np.array([len(piece) for piece in pieces], np.int64))
    got = replace_segments(flat, offsets, {k: np.array(v, np.int32) for k, v in new.items()})
    want = [value for k, piece in enumerate(pieces) for value in new.get(k, piece)]
    assert got.tolist() == want
