"""Strategies for the texts of property tests: ordinary and unusual ones."""

from __future__ import annotations

import unicodedata

from hypothesis import strategies as st

_any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
_whitespace = st.text(st.sampled_from(" \t\n\r\u00a0\u3000a.é1"), max_size=30)
_marks = st.text(
    st.sampled_from("aeou가ㅏqd\u0301\u0302\u0308\u0323\u0307\u0345\u3099\u093c\u0fb7が각ẛ"),
    max_size=20,
)
_words = st.lists(
    st.sampled_from(
        [
            "hello",
            "don't",
            "I'LL",
            "12345",
            "中文",
            "привет",
            "naïve",
            "!?",
            "...",
            "👩‍👩‍👧",
            "🇩🇪",
            "ﬁ",
            "▁",
            "<0x0A>",
            "\x00",
            "x" * 40,
        ]
    )
).map(" ".join)


def texts(added: list[str]) -> st.SearchStrategy[str]:
    """Return a strategy for any text, and for texts with the tokens of `added` in any context."""
    pieces = st.sampled_from([*added, " ", "  ", "\n", "a", "é", "hello world", "<", "|>", "▁"])
    mixed = st.lists(pieces, max_size=12).map("".join)
    return st.one_of(
        _any_text,
        _whitespace,
        _marks,
        _marks.map(lambda t: unicodedata.normalize("NFC", t)),
        _words,
        mixed,
    )
