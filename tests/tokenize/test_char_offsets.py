"""Character ranges from bytes are right, and available for all texts for which bytes suffice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftprep.tokenize.encoders.base import flat_tokens
from sftprep.tokenize.encoders.char_offsets import TokenBytes, char_ranges, token_bytes
from tests.tokenize.small_tokenizers import byte_level, sentence_piece, spec_of


def table_of(pieces: list[bytes], added: list[int], *, prepends: bool) -> TokenBytes:
    length = np.array([len(piece) for piece in pieces], np.int64)
    return TokenBytes(
        data=np.frombuffer(b"".join(pieces), np.uint8),
        start=np.cumsum(length) - length,
        length=length,
        added=np.isin(np.arange(len(pieces)), added),
        starts_with_space=np.array([piece.startswith(b" ") for piece in pieces]),
        prepends_space=prepends,
    )


def ranges_slow(text: str, pieces: list[bytes]) -> list[tuple[int, int]]:
    """Compute the ranges byte by byte: the characters of which a token has a byte."""
    owner = [number for number, character in enumerate(text) for _ in character.encode()]
    found, at = [], 0
    for piece in pieces:
        held = owner[at : at + len(piece)]
        found.append((held[0], held[-1] + 1))
        at += len(piece)
    return found


@st.composite
def cut_texts(draw: st.DrawFn) -> tuple[str, list[bytes]]:
    """A text, and its bytes cut at any positions."""
    text = draw(st.text(st.sampled_from("aé中🤯 \u0301"), min_size=1, max_size=12))
    content = text.encode()
    cuts = sorted(
        draw(st.sets(st.integers(1, max(len(content) - 1, 1)))) if len(content) > 1 else []
    )
    return text, [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)], strict=True)]


@settings(max_examples=150, deadline=None)
@given(
    cases=st.lists(st.one_of(cut_texts(), st.just(("", []))), max_size=5),
    wrong=st.sets(st.integers(0, 4)),
)
def test_ranges_equal_the_loop_over_bytes_and_differing_texts_are_returned(
    cases: list[tuple[str, list[bytes]]], wrong: set[int]
) -> None:
    pieces = sorted({piece for _, cut in cases for piece in cut}) or [b"x"]
    tokens = flat_tokens(
        [np.array([pieces.index(piece) for piece in cut], np.int32) for _, cut in cases]
    )
    # A text whose bytes differ from those of its tokens: longer, or with the same length.
    wrong = {number for number in wrong if number < len(cases) and cases[number][0]}
    shown = [
        text[:-1] + "\x01" if number in wrong else text for number, (text, _) in enumerate(cases)
    ]
    chars, unknown = char_ranges(shown, tokens, table_of(pieces, [], prepends=False))
    assert set(unknown) == wrong
    for number, (text, cut) in enumerate(cases):
        if number not in wrong:
            own = chars[tokens.offsets[number] : tokens.offsets[number + 1]]
            assert [tuple(row) for row in own.tolist()] == ranges_slow(text, cut)


def test_the_added_space_belongs_to_the_first_character() -> None:
    table = table_of([b" ", b" a", b"<x>", b"  ", b"b"], [2], prepends=True)
    ids = [[0, 1], [1, 2, 1], [3], [1, 4], [4, 1]]
    chars, unknown = char_ranges(
        [" a", "a<x>a", " ", "ab", "ba"], flat_tokens([np.array(i, np.int32) for i in ids]), table
    )
    assert unknown == [4]  # its tokens are "b a", and no space was added before it
    assert chars[:8].tolist() == [[0, 1], [0, 2], [0, 1], [1, 4], [4, 5], [0, 1], [0, 1], [1, 2]]


@pytest.mark.parametrize("ids", [[-1], [9]])
def test_texts_with_ids_outside_the_vocabulary_are_returned(ids: list[int]) -> None:
    tokens = flat_tokens([np.array(ids, np.int32), np.array([0], np.int32)])
    assert 0 in char_ranges(["a", "a"], tokens, table_of([b"a"], [], prepends=False))[1]


def test_families_that_are_recognized() -> None:
    def known(tokenizer: object) -> TokenBytes | None:
        return token_bytes(spec_of(tokenizer), {0: b"a"})  # type: ignore[arg-type]

    assert (table := known(byte_level(nfc=True, gpt4=True))) is not None
    assert not table.prepends_space
    assert (table := known(sentence_piece(prepend=True))) is not None
    assert table.prepends_space
    assert (table := known(sentence_piece(prepend=False))) is not None
    assert not table.prepends_space
    assert known(byte_level(trim=True)) is None
