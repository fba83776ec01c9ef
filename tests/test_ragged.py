"""Pieces of arrays, held against slices of lists."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftprep.ragged import Ragged, edges

several = st.lists(st.lists(st.integers(0, 255), max_size=5), max_size=8)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
@given(pieces=several, data=st.data())
def test_pieces_in_another_order(dtype: type, pieces: list[list[int]], data: st.DataObject) -> None:
    ragged: Ragged[np.int32] = Ragged.of([np.array(piece, dtype) for piece in pieces], dtype)
    assert (
        ragged.edges.tolist()
        == edges(np.array([len(piece) for piece in pieces], np.int64)).tolist()
    )
    which = data.draw(st.lists(st.integers(0, len(pieces) - 1), max_size=12)) if pieces else []
    taken = ragged.taken(np.array(which, np.int64))
    assert taken.values.dtype == dtype
    assert taken.values.tolist() == [value for number in which for value in pieces[number]]
    assert np.diff(taken.edges).tolist() == [len(pieces[number]) for number in which]
