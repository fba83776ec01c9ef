"""Pieces of arrays, held against slices of lists."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftprep.ragged import SLOT, Pieces, Ragged, edges

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


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
@given(parts=several, fixed=several, apart=st.integers(0, 2), data=st.data())
def test_pieces_among_fixed_ones(
    dtype: type, parts: list[list[int]], fixed: list[list[int]], apart: int, data: st.DataObject
) -> None:
    values, first, last = [7] * apart, [], []
    for part in parts:
        first.append(len(values))
        values += part
        last.append(len(values))
        values += [7] * apart
    pieces: Pieces[np.int32] = Pieces(
        np.array(values, dtype), np.array(first, np.int64), np.array(last, np.int64)
    )
    joined = pieces.joined()
    assert joined.values.tolist() == [value for part in parts for value in part]
    assert np.diff(joined.edges).tolist() == [*map(len, parts)]

    others = data.draw(st.lists(st.integers(0, len(fixed) - 1), max_size=8)) if fixed else []
    order = data.draw(st.permutations([SLOT] * len(parts) + others))
    made = pieces.within(
        np.array(order, np.int64), Ragged.of([np.array(piece, dtype) for piece in fixed], dtype)
    )
    slots = iter(parts)
    expected = [next(slots) if number == SLOT else fixed[number] for number in order]
    assert made.values.tolist() == [value for piece in expected for value in piece]
    assert np.diff(made.edges).tolist() == [*map(len, expected)]
