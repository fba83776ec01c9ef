"""Texts that are joined with a separator get the ids that single calls give."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from sftprep.tokenize.encoders.base import Encoder
from sftprep.tokenize.encoders.load import load_encoder
from sftprep.tokenize.encoders.separators import find_separator
from sftprep.tokenize.loading.spec import TokenizerSpec
from tests.support import needs_shared
from tests.tokenize.real_tokenizers import REAL_PAIRS, real_spec
from tests.tokenize.small_tokenizers import END, START, STOP, byte_level, sentence_piece, spec_of

_longer = f"{END}system"
MADE: dict[str, Tokenizer] = {
    "as gpt-2": byte_level(),
    "as llama": byte_level(nfc=True, gpt4=True),
    "as qwen": byte_level(nfc=True, qwen=True),
    "a token that strips whitespace": byte_level(
        added=(AddedToken("<mask>", lstrip=True, rstrip=True, normalized=False),)
    ),
    "whitespace as tokens": byte_level(
        added=(AddedToken("  ", normalized=False), AddedToken("\n\n", normalized=False))
    ),
    "a longer token": byte_level(added=(AddedToken(_longer, special=True, normalized=False),)),
    "a token matched after normalization": byte_level(
        nfc=True, added=(AddedToken("\u00e9x", normalized=True),)
    ),
    "single characters": byte_level(
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
def encoder_of(encoder: str, name: str) -> Encoder:
    return load_encoder(spec(name), encoder, threads=False)


def check(encoder: str, name: str, texts: list[str]) -> None:
    fast = encoder_of(encoder, name)
    together = fast.encode(texts)
    assert [together.ids_of_text(k).tolist() for k in range(len(texts))] == [
        fast.encode([text]).input_ids.tolist() for text in texts
    ]


@cache
def texts_of(name: str) -> st.SearchStrategy[list[str]]:
    between = find_separator(spec(name))
    own = [] if between is None else [between.text, between.text[:-1], between.text[1:]]
    pieces = st.sampled_from([*PIECES, *own, *list(spec(name).added_tokens())[:20]])
    return st.lists(st.lists(pieces, max_size=5).map("".join), max_size=6)


@pytest.mark.parametrize(
    ("encoder", "name"),
    [
        (encoder, name)
        for encoder in ("gigatoken", "fastokens")
        for name in MADE
        # fastokens refuses tokens that are matched after normalization.
        if (encoder, name) != ("fastokens", "a token matched after normalization")
    ],
)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_ids_equal_those_of_single_calls(encoder: str, name: str, data: st.DataObject) -> None:
    check(encoder, name, data.draw(texts_of(name)))


@needs_shared
@pytest.mark.parametrize(("encoder", "name"), REAL_PAIRS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_ids_equal_those_of_single_calls_with_real_tokenizers(
    encoder: str, name: str, data: st.DataObject
) -> None:
    check(encoder, name, data.draw(texts_of(name)))


def test_a_separator_is_found_for_byte_level_tokenizers_only() -> None:
    assert find_separator(spec("as gpt-2")) is not None
    assert find_separator(spec("as qwen")) is not None
    assert find_separator(spec_of(sentence_piece(prepend=True))) is None
    assert find_separator(spec_of(byte_level(add_prefix_space=True))) is None


def test_a_token_without_a_role_is_preferred() -> None:
    between = find_separator(
        spec_of(byte_level(), eos_token=END, chat_template=f"{START} and no other")
    )
    assert between is not None
    assert between.text == STOP


def test_a_token_that_the_template_writes_is_the_last_choice() -> None:
    """Each text would contain it, and would have to be encoded on its own."""
    roles = {"bos_token": START, "eos_token": END, "pad_token": STOP}
    separator = find_separator(spec_of(byte_level(), **roles, chat_template="{{ bos_token }}"))
    assert separator is not None
    assert separator.text == STOP


def test_a_token_that_is_the_start_of_another_is_not_a_separator() -> None:
    """With the following text it would become the other token, and a text that contains it could
    make the number of separators right again."""
    between = find_separator(spec("a longer token"))
    assert between is not None
    assert between.text != END
    for encoder in ("gigatoken", "fastokens"):
        check(encoder, "a longer token", [f"x{END}y", "system z"])


@pytest.mark.parametrize("added", ["word", "_word"])
def test_a_token_with_a_word_character_at_an_end_is_not_a_separator(added: str) -> None:
    """Some tokens are only matched as whole words."""
    tokenizer = byte_level(added=(AddedToken(added, special=True, normalized=False),))
    between = find_separator(spec_of(tokenizer, eos_token=STOP, chat_template=f"{START}{END}"))
    assert between is not None
    assert between.text != added
