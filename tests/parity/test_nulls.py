"""Nulls that tables put into records are stripped, when asked, as TRL's own function for it
does."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftprep.sources.readers.to_jsonl import without_nulls

pytestmark = pytest.mark.parity

LEAF = st.none() | st.booleans() | st.integers() | st.text(max_size=4)
VALUE = st.recursive(
    LEAF,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@settings(deadline=None)  # TRL's import is within the first
@given(st.lists(st.dictionaries(st.text(max_size=3), VALUE, max_size=4), max_size=5))
def test_nulls_are_stripped_as_trl_does(rows):
    trl = pytest.importorskip("trl.trainer.utils")
    assert without_nulls(rows) == trl.remove_none_values(rows)
