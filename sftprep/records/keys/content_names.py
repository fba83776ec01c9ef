"""Names of keys that suggest content, for columns of records and for keys of turns alike."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from sftprep.core.json_values import iter_leaves
from sftprep.records.keys.pair_keys import PAIRS, is_reasoning_mode, split_key

_NAMES = frozenset(
    {
        *(key for pair in PAIRS for key in pair),
        *("answers", "hint", "hints", "result", "results", "response", "responses", "solutions"),
        *("explanation", "rationale", "refusal", "code", "options", "choices", "context"),
        *("text", "value", "content", "contents", "summary", "title", "caption", "abstract"),
        *("passage", "passages", "paragraph", "paragraphs", "body", "article", "transcript"),
        *("cot", "think", "thinking", "thought", "thoughts", "reasoning", "reasoning_content"),
    }
) - {"user", "human"}
"""Names of content: even a single word or a number under them is content."""

_REASONING_WORDS = frozenset(
    {"reasoning", "thinking", "thought", "thoughts", "cot", "rationale", "explanation"}
)
"""Words of other names of content, such as `deepseek_reasoning`; it is text, of a word or more."""

_TEXT_WORDS = frozenset(
    {
        *("system", "document", "documents", "tool", "tools", "functions"),
        *("instructions", "developer"),
    }
)
"""Words of names whose values are content if they are text of several words."""

WORDS_OF_METADATA = frozenset(
    {
        *("id", "ids", "url", "hash", "length", "len", "tokens", "count", "num", "score"),
        *("time", "date", "type", "name", "source", "model"),
    }
)
"""Words of keys whose values describe a record or a turn, and are not a part of it."""

_WORD = re.compile(r"[^\s\d!-/:-@\[-`{-~]{2}")
_UNSPACED = r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u9fff\uac00-\ud7af]"
"""Characters of languages that are written without spaces (Thai, Lao, Burmese, Khmer, Chinese,
Japanese)."""
_UNSPACED_WORDS, _UNSPACED_PROSE = re.compile(_UNSPACED + "{4}"), re.compile(_UNSPACED + "{12}")
_UNSPACED_CHARACTER = re.compile(_UNSPACED)
_LEAST_PROSE = 4
_LONGEST_WORD = 64


@lru_cache(maxsize=4096)
def has_content_name(key: str) -> bool:
    """Return whether the name of a key suggests content."""
    words = split_key(key)
    return key.lower() in _NAMES or (
        not words.isdisjoint(_REASONING_WORDS | _TEXT_WORDS) and words.isdisjoint(WORDS_OF_METADATA)
    )


def is_content(key: str, value: Any) -> bool:
    """Return whether a key and its value appear to be content.

    Example:
        ("answer", 4), ("long_cot", "Obvious."), ("developer", "Be very brief.")  ->  True
        ("thinking", "high"), ("developer", "Kiel"), ("source", "the web")        ->  False
    """
    if isinstance(value, str | bool) and is_reasoning_mode(key, value):
        return False
    if key.lower() in _NAMES:
        return True
    if not has_content_name(key):
        return False
    strings = [leaf for leaf in iter_leaves(value) if isinstance(leaf, str)]
    if split_key(key).isdisjoint(_REASONING_WORDS):
        return any(map(is_text, strings))
    return any(text.strip() for text in strings)


def is_text(value: str) -> bool:
    """Return whether a string is text, as opposed to an id, a date or a single word."""
    return _UNSPACED_WORDS.search(value) is not None or _has_words(value, 2)


def is_prose(value: str) -> bool:
    """Return whether a string is text that is too long for a title, a date or the name of a model.

    It has at least four words, or twelve characters of a language without spaces.
    """
    return _UNSPACED_PROSE.search(value) is not None or _has_words(value, _LEAST_PROSE)


def _has_words(value: str, number: int) -> bool:
    # One regular expression for several words would take quadratic time for a long one, such as
    # the bytes of an audio in base64.
    words = filter(_WORD.search, value.split())
    return all(next(words, None) is not None for _ in range(number))


def is_in(value: str, text: str) -> bool:
    """Return whether a text contains a string as words of its own.

    Example:
        ("4", "It is 4."), ("4", "4")     ->  True
        ("4", "It is 14."), ("4", "4.5")  ->  False
    """
    value = value.strip()
    if len(value) > _LONGEST_WORD or not value:
        return value in text
    return any(
        _ends_word(text[max(start - 2, 0) : start][::-1], value[0])
        and _ends_word(text[start + len(value) : start + len(value) + 2], value[-1])
        for start in _find_all(value, text)
    )


def _find_all(value: str, text: str) -> Iterator[int]:
    start = text.find(value)
    while start >= 0:
        yield start
        start = text.find(value, start + 1)


def _ends_word(others: str, character: str) -> bool:
    """Return whether a character ends a word, or a number, before the next two characters."""
    if not character.isalnum() or _UNSPACED_CHARACTER.match(character) or not others:
        return True
    if character.isdigit() and others[0] in ".," and others[1:].isdigit():
        return False
    is_part = others[0].isalnum() or others[0] == "_"
    return not is_part or _UNSPACED_CHARACTER.match(others) is not None
