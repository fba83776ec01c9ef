"""The internals of other libraries on which sfttrain/compat.py depends still exist."""

from __future__ import annotations

import dis
import sys

import pytest
import torch
from transformers import masking_utils

from sfttrain.compat import SEARCH_NAME, count_unpacked_values, skip_sequence_search
from sfttrain.data.batching import collate_packs
from sfttrain.packed.attention import resolve_attention
from sfttrain.packed.forward import packed_arguments, scored_outputs
from tests.sfttrain.packs import make_pack
from tests.sfttrain.tiny import tiny_model


def test_transformers_searches_position_ids_by_the_name_that_is_patched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An error in place of the search is raised by a forward, but not while it is skipped."""

    def fail(position_ids: torch.Tensor) -> None:
        raise AssertionError("position_ids were searched")

    model = tiny_model("llama")
    mode = resolve_attention(model, "sft_varlen", longest=8)
    batch = collate_packs([make_pack([3, 4])])
    assert callable(getattr(masking_utils, SEARCH_NAME))
    monkeypatch.setattr(masking_utils, SEARCH_NAME, fail)
    with pytest.raises(AssertionError, match="were searched"):
        model(**packed_arguments(batch, mode))
    scored_outputs(model, batch, mode)
    assert getattr(masking_utils, SEARCH_NAME) is fail


def test_the_search_is_restored_after_an_error() -> None:
    search = getattr(masking_utils, SEARCH_NAME)
    context = skip_sequence_search()
    context.__enter__()
    assert getattr(masking_utils, SEARCH_NAME) is not search
    assert not context.__exit__(ValueError, ValueError("inside"), None)
    assert getattr(masking_utils, SEARCH_NAME) is search


def test_nothing_is_patched_if_transformers_has_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(masking_utils, SEARCH_NAME)
    with skip_sequence_search():
        assert not hasattr(masking_utils, SEARCH_NAME)


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="the bytecode is CPython's")
def test_cpython_unpacks_with_the_instruction_that_is_read() -> None:
    assert "UNPACK_SEQUENCE" in dis.opmap
    counts: list[int | None] = []

    class Recorder:
        def __iter__(self):
            counts.append(count_unpacked_values(sys._getframe(1)))
            return iter(range(counts[-1] or 3))

    _a, _b = Recorder()
    _a, _b, _c = Recorder()
    list(Recorder())
    assert counts == [2, 3, None]
