"""The keys of records with a request and its answer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")

_SEPARATOR = re.compile(r"[\W_]+")

PAIRS: tuple[tuple[str, str], ...] = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("instruction", "completion"),
    ("instruction", "answer"),
    # Before the answers: where a record has both, the solution has the steps that lead to it.
    ("problem", "solution"),
    ("question", "solution"),
    ("question", "answer"),
    ("question", "response"),
    ("question", "output"),
    ("problem", "answer"),
    ("query", "response"),
    ("query", "answer"),
    ("query", "answers"),
    ("query", "output"),
    ("prompt", "response"),
    ("prompt", "answer"),
    ("prompt", "output"),
    ("prompt", "solution"),
    ("inputs", "targets"),
    ("inputs", "outputs"),
    ("input", "output"),
    ("input", "target"),
    ("input", "response"),
    ("input", "answer"),
    ("user", "assistant"),
    ("human", "assistant"),
    ("human", "gpt"),
    ("human", "bot"),
    ("message_1", "message_2"),
)
"""The known pairs of keys, in the order in which they are tried."""

SYSTEM_KEYS = ("system", "system_prompt", "systemInstruction", "system_instruction")
"""Keys of the system prompt alongside a conversation."""

CONTEXT_KEYS = ("input", "context")
"""Keys of the input of an instruction."""


ANSWER_REASONING_KEYS = ("reasoning", "reasoning_content", "thinking")
"""Keys of the reasoning before that answer."""

_REASONING_WORDS = frozenset({"reasoning", "thinking", "think"})
_REASONING_MODES = frozenset(
    {
        *("", "on", "off", "none", "low", "medium", "high", "true", "false"),
        *("minimal", "auto", "enabled", "disabled", "yes", "no"),
    }
)
"""Values that say how much reasoning was requested."""


def split_key(key: str) -> set[str]:
    """Return the words of a key, in lower case.

    Example:
        "fullAnswer2"  ->  {"full", "answer", "2", "fullanswer2"}
        "Long_CoT"     ->  {"long", "co", "t", "cot"}
    """
    words = {word.lower() for word in _WORD.findall(key)}
    return words | {word for word in _SEPARATOR.split(key.lower()) if word}


def find_pair(record: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the first known pair of keys in a record."""
    for pair in PAIRS:
        if record.get(pair[0]) is not None and record.get(pair[1]) is not None:
            return pair
    return None


def find_reasoning(record: Mapping[str, Any]) -> str | None:
    """Return the reasoning under a key of its own, or None.

    A value such as "high" says how much reasoning was requested.
    """
    for key in ANSWER_REASONING_KEYS:
        reasoning = record.get(key)
        if isinstance(reasoning, str) and not is_reasoning_mode(key, reasoning):
            return reasoning
    return None


def is_reasoning_mode(key: str, value: str | bool) -> bool:
    """Return whether a value says how much reasoning was requested.

    Example:
        ("reasoning", "high"), ("thinking", True)  ->  True
        ("reasoning", "First I add.")              ->  False
    """
    is_mode = isinstance(value, bool) or value.strip().lower() in _REASONING_MODES
    return is_mode and not _REASONING_WORDS.isdisjoint(split_key(key))
