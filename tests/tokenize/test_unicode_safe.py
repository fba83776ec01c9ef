"""The table of safe characters holds only what all Unicode tables in use agree on."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from sftprep.errors import TokenizerError
from sftprep.tokenize.encoders.base import first_mismatch
from sftprep.tokenize.encoders.gigatoken import GigatokenEncoder
from sftprep.tokenize.encoders.load import load_encoder
from sftprep.tokenize.encoders.unicode_safe import (
    COMBINING,
    SAFE,
    _parse_ranges,
    _safe_table,
    is_safe,
    texts_to_check,
)
from tests.support import needs_shared
from tests.tokenize.real_tokenizers import real_fast, real_reference
from tests.tokenize.small_tokenizers import byte_level, spec_of

_codes = np.flatnonzero(_safe_table()).tolist()
_marks = [
    code
    for code in _codes
    if unicodedata.combining(chr(code)) or unicodedata.decomposition(chr(code))
]


def test_ranges_are_sorted_and_disjoint() -> None:
    bounds = [int(part, 16) for entry in SAFE.split() for part in (entry.split("-") * 2)[:2]]
    assert bounds == sorted(bounds)
    assert all(
        later > earlier + 1 for earlier, later in zip(bounds[1:-1:2], bounds[2::2], strict=True)
    )


def test_all_are_assigned_and_ordinary_texts_are_safe() -> None:
    if tuple(map(int, unicodedata.unidata_version.split("."))) >= (14, 0, 0):
        assert not [hex(code) for code in _codes if unicodedata.category(chr(code)) in ("Cn", "Cs")]
    texts = [
        "hello",
        "naïve “quotes” – … €",
        "中文日本語한국어",
        "привет ά עִבְרִית عَرَبِيّ हिन्दी ไทย",
        "🤯🥺👩🏽‍🚀🇩🇪❤️",
        "𝔘∑→▁",
        "\ue000\ufffd",
    ]
    assert all(map(is_safe, texts))


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from([chr(code) for code in _marks] + list("aou가")), max_size=12))
def test_tokenizers_composes_safe_text_as_unicode_does(text: str) -> None:
    assert normalizers.NFC().normalize_str(text) == unicodedata.normalize("NFC", text)


def test_each_safe_mark_composes_alike() -> None:
    nfc = normalizers.NFC()
    for code in _marks:
        for text in (
            f"a{chr(code)}",
            f"a\u0345{chr(code)}",
            f"a{chr(code)}\u0334",
            f"{chr(code)}\u0301",
        ):
            assert nfc.normalize_str(text) == unicodedata.normalize("NFC", text), hex(code)


@needs_shared
@pytest.mark.parametrize(
    ("encoder", "name"),
    [
        ("gigatoken", "deepseek-v4"),
        ("gigatoken", "qwen3"),
        ("fastokens", "deepseek-v4"),
        ("fastokens", "qwen3"),
        ("fastokens", "smollm2"),
    ],
)
def test_every_safe_character_has_the_same_class_in_both_libraries(encoder: str, name: str) -> None:
    """Each is tested between letters, digits, whitespace, symbols and line ends. Of long runs of
    letters, every 97th is tested."""
    plain = [c for c in _codes if 0x3400 <= c < 0xFA00 or c >= 0x20000]
    codes = [c for c in _codes if not (0x3400 <= c < 0xFA00 or c >= 0x20000)] + plain[::97]
    texts = [f"a{c}b {c} 1{c}2!{c}!\n{c}\n {c}{c}a" for c in map(chr, codes)]
    texts = ["".join(texts[i : i + 50]) for i in range(0, len(texts), 50)]
    assert all(map(is_safe, texts))
    tokens = real_fast(encoder, name).encode(texts)
    assert first_mismatch(texts, real_reference(name).encode(texts), tokens) is None


@needs_shared
def test_texts_on_which_unicode_tables_differ_are_left_to_the_reference() -> None:
    """Without the check, some builds of gigatoken give other ids for these texts."""
    for name, text in (("qwen3", "\U0001e135\U00011235"), ("deepseek-v4", "a \U0001faea")):
        fast = real_fast("gigatoken", name)
        assert isinstance(fast, GigatokenEncoder)
        assert texts_to_check(["a", text], [b"a", text.encode()]) == [1]
        assert not is_safe(text)
        expected = real_reference(name).encode([text])
        assert first_mismatch([text], expected, fast.encode([text])) is None


@given(
    st.lists(
        st.text(st.sampled_from("aé中🤯\u0378\ufffe\U0001faea\u0301\u093c\uac00\u11a8")), max_size=5
    )
)
def test_finds_the_texts_to_check(texts: list[str]) -> None:
    found = texts_to_check(texts, [text.encode() for text in texts])
    odd = {"\u0378", "\ufffe", "\U0001faea", "\u0301", "\u093c", "\u11a8"}
    assert found == [number for number, text in enumerate(texts) if odd & {*text}]


def test_every_character_is_found_by_its_bytes() -> None:
    careful = ~_safe_table() | _parse_ranges(COMBINING)
    codes = [code for code in range(0x80, 0x110000) if not 0xD800 <= code < 0xE000]
    texts = [chr(code) for code in codes]
    found = texts_to_check(texts, [text.encode() for text in texts])
    assert found == np.flatnonzero(careful[codes]).tolist()


@given(st.text(max_size=8))
def test_texts_that_need_no_check_are_safe_and_normalized(text: str) -> None:
    if not texts_to_check([text], [text.encode()]):
        assert is_safe(text)
        assert unicodedata.is_normalized("NFC", text)


def test_all_characters_that_compose_are_combining() -> None:
    combining = _parse_ranges(COMBINING)
    for code in np.flatnonzero(_safe_table()).tolist():
        parts = unicodedata.decomposition(chr(code))
        pair = [int(part, 16) for part in parts.split()] if parts and parts[0] != "<" else []
        moves = unicodedata.combining(chr(code)) > 0
        moves |= not unicodedata.is_normalized("NFC", chr(code))
        assert combining[code] or not moves, hex(code)
        if len(pair) == 2:
            assert combining[pair[1]] or not _safe_table()[pair[1]], hex(pair[1])


@pytest.mark.parametrize("name", ["gigatoken", "fastokens"])
def test_half_a_surrogate_pair_is_refused(name: str) -> None:
    with pytest.raises(TokenizerError, match="surrogate"):
        load_encoder(spec_of(byte_level()), name, threads=False).encode(["a", "\ud800"])


@pytest.mark.parametrize("name", ["gigatoken", "fastokens"])
def test_both_encoders_agree_on_all_safe_characters(name: str) -> None:
    encoder = load_encoder(spec_of(byte_level(nfc=True, gpt4=True)), name, threads=False)
    reference = load_encoder(spec_of(byte_level(nfc=True, gpt4=True)), "tokenizers", threads=False)
    texts = ["".join(map(chr, _codes[i : i + 40])) for i in range(0, len(_codes), 997)]
    assert first_mismatch(texts, reference.encode(texts), encoder.encode(texts)) is None
