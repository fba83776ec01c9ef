"""Texts that are encoded in one call, with a token between them, get the ids that each gets
alone."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from sftprep.tokenize.encoders.gigatoken import FastEncoder
from sftprep.tokenize.encoders.reference import HfEncoder
from sftprep.tokenize.encoders.separators import find_separator
from sftprep.tokenize.loading.spec import TokenizerSpec
from tests.support import needs_shared
from tests.tokenize.made import END, START, STOP, byte_level, sentence_piece, spec_of
from tests.tokenize.real import FAST, real_spec

_longer = f"{END}system"
MADE: dict[str, Tokenizer] = {
    "as gpt-2": byte_level(),
    "as llama": byte_level(nfc=True, gpt4=True),
    "as qwen": byte_level(nfc=True, qwen=True),
    "one that takes blanks": byte_level(
        added=(AddedToken("<mask>", lstrip=True, rstrip=True, normalized=False),)
    ),
    "blanks as tokens": byte_level(
        added=(AddedToken("  ", normalized=False), AddedToken("\n\n", normalized=False))
    ),
    "a longer one": byte_level(added=(AddedToken(_longer, special=True, normalized=False),)),
    "one after normalizing": byte_level(nfc=True, added=(AddedToken("\u00e9x", normalized=True),)),
    "bare letters": byte_level(
        added=(AddedToken("a", normalized=False), AddedToken(">", normalized=False))
    ),
}
PIECES = [
    END,
    START,
    STOP,
    _longer,
    END[:-1],
    END[1:],
    "<",
    "<|",
    "|>",
    "system",
    "<mask>",
    " ",
    "  ",
    "\n",
    "\n\n",
    "a",
    "x",
]
PIECES += [
    "0",
    "\x01",
    "0\x010",
    ".",
    "e",
    "\u00e9x",
    "\u0301",
    "\u0323",
    "\u3099",
    "\uac00",
    "\u11a8",
    "hello",
    "'s",
    "12",
    "中",
    "\U0001f600",
    "\x00",
    "_",
]


@cache
def spec(name: str) -> TokenizerSpec:
    return spec_of(MADE[name]) if name in MADE else real_spec(name)


@cache
def encoder(name: str) -> FastEncoder:
    return FastEncoder(spec(name), reference=lambda: HfEncoder(spec(name), threads=False))


def check(name: str, texts: list[str]) -> None:
    together = encoder(name).encode(texts)
    assert [together.ids_of_text(k).tolist() for k in range(len(texts))] == [
        encoder(name).encode([t]).input_ids.tolist() for t in texts
    ]


def texts_of(name: str) -> st.SearchStrategy[list[str]]:
    between = find_separator(spec(name))
    own = [] if between is None else [between.text, between.text[:-1], between.text[1:]]
    pieces = st.sampled_from([*PIECES, *own, *list(spec(name).added_tokens())[:20]])
    return st.lists(st.lists(pieces, max_size=5).map("".join), max_size=6)


@pytest.mark.parametrize("name", MADE)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_together_as_alone(name: str, data: st.DataObject) -> None:
    check(name, data.draw(texts_of(name)))


@needs_shared
@pytest.mark.parametrize("name", FAST)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_together_as_alone_with_real_tokenizers(name: str, data: st.DataObject) -> None:
    check(name, data.draw(texts_of(name)))


def test_a_token_is_found_where_there_may_be_one() -> None:
    assert find_separator(spec("as gpt-2")) is not None
    assert find_separator(spec("as qwen")) is not None
    assert find_separator(spec_of(sentence_piece(prepend=True))) is None
    assert find_separator(spec_of(byte_level(add_prefix_space=True))) is None


def test_one_that_no_text_ends_with_is_best() -> None:
    between = find_separator(
        spec_of(byte_level(), eos_token=END, chat_template=f"{START} and no other")
    )
    assert between is not None
    assert between.text == STOP


def test_a_token_that_starts_another_does_not_stand_between() -> None:
    """What comes after it would make it the other one, and with a text that spells it the number of
    them would be right."""
    between = find_separator(spec("a longer one"))
    assert between is not None
    assert between.text != END
    check("a longer one", [f"x{END}y", "system z"])


@pytest.mark.parametrize("added", ["word", "_word"])
def test_ends_of_a_word_do_not_stand_between(added: str) -> None:
    """Some tokens are found only where no word goes on."""
    tokenizer = byte_level(added=(AddedToken(added, special=True, normalized=False),))
    between = find_separator(spec_of(tokenizer, eos_token=STOP, chat_template=f"{START}{END}"))
    assert between is not None
    assert between.text != added
