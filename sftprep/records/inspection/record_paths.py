"""The texts in a record of unknown format, and what their keys and values say about them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from sftprep.records.keys.pair_keys import PAIRS, split_key
from sftprep.records.options import Record, opaque_kind
from sftprep.records.roles import to_role

Path = tuple[str | int, ...]
"""The keys and indices that lead to a value of a record."""
Part = Literal["request", "answer", "context", "choices", "system", "reasoning", "metadata"]
"""What a text may be a part of."""

_DEEPEST = 10
_SHOWN_KEYS = 12
_MOST_VALUES = 2000

REQUEST_WORDS = {request for request, _ in PAIRS} | {
    *("ask", "task", "request", "src", "user", "human"),
}
ANSWER_WORDS = {answer for _, answer in PAIRS} | {
    *("reply", "replies", "label", "code", "summary", "result", "tgt", "responses"),
}
REASONING_WORDS = {"reasoning", "thinking", "thought", "thoughts", "cot", "rationale"}
_INPUT_WORDS = {"input", "inputs"}
ID_WORDS = {"id", "uid", "uuid"}
_WORDS_OF_FACTS = ID_WORDS | {
    *("ids", "url", "role", "type", "length", "count", "num", "date", "score", "name"),
    *("tool", "tools", "function", "functions", "command", "commands"),
}
"""Words of keys that are neither a request nor an answer, such as `question_type`."""
_METADATA_WORDS = {
    *("idx", "index", "hash", "source", "meta", "metadata", "lang", "language", "time"),
    *("timestamp", "model", "license", "split", "category", "topic", "domain", "subject"),
    *("tag", "tags", "version", "title", "difficulty", "level", "file", "path", "repo", "author"),
}
_PARTS: tuple[tuple[Part, set[str]], ...] = (
    ("metadata", _WORDS_OF_FACTS),
    ("system", {"system", "sys", "persona", "preamble", "meta_instruction"}),
    ("reasoning", REASONING_WORDS),
    ("choices", {"choices", "options", "endings"}),
    ("context", {"context", "contexts", "passage", "background", "document", "premise"}),
    ("answer", ANSWER_WORDS),
    ("request", REQUEST_WORDS),
    ("metadata", _METADATA_WORDS),
)
"""The words of keys for each part, in the order in which they decide."""


_UNNAMED: dict[str, tuple[Part | None, ...]] = {
    "request": (None, "metadata", "context"),
    "answer": (None, "metadata"),
}
"""What a request or an answer may be according to its keys, if none is named so, in order."""


@dataclass(frozen=True, slots=True)
class Text:
    """A text in a record.

    Attributes:
        path: Where it is.
        value: The text.
        part: What its keys say; None if they say nothing.
    """

    path: Path
    value: str
    part: Part | None

    @property
    def is_prose(self) -> bool:
        """Return whether it looks like content, and not like a code, a name or a date."""
        return len(self.value.split()) > 2


def to_expression(path: Path, root: str = "record") -> str:
    """Return the Python expression for a value.

    Example:
        ("answers", "text", 0)  ->  "record['answers']['text'][0]"
    """
    return root + "".join(f"[{key!r}]" for key in path)


def find_context(record: Record, request: Text | None, answer: Text | None) -> str | None:
    """Return the key of the input of a request, which may be empty in this record.

    A key such as "Input" is that of a request, unless another one is.
    """
    taken = {text.path[0] for text in (request, answer) if text is not None}
    for key, value in record.items():
        is_input = part_of((key,)) == "context" or not words_of(key).isdisjoint(_INPUT_WORDS)
        if isinstance(value, str) and is_input and key not in taken:
            return key
    return None


def iter_values(record: Record) -> Iterator[tuple[Path, Any]]:
    """Yield the values in a record with their paths, outer ones first.

    Values of a table that are not JSON are left out.
    """
    level: list[tuple[Path, Any]] = [((key,), value) for key, value in record.items()]
    number = 0
    while level:
        next_level: list[tuple[Path, Any]] = []
        for path, value in level:
            if opaque_kind(value) is not None:
                continue
            yield path, value
            if isinstance(value, dict):
                next_level += (((*path, key), item) for key, item in value.items())
            elif isinstance(value, list):
                next_level += (((*path, k), item) for k, item in enumerate(value))
            number += 1
            if number >= _MOST_VALUES:
                return
        level = next_level if len(level[0][0]) < _DEEPEST else []


def find_texts(record: Record) -> list[Text]:
    """Return the texts of a record that are not empty; of a list of texts, only the first one."""
    return [
        Text(path, value, part_of(path))
        for path, value in iter_values(record)
        if isinstance(value, str)
        and value.strip()
        and not any(isinstance(k, int) and k for k in path)
    ]


def find_choices(record: Record) -> Path | None:
    """Return the path of choices as texts: a list, or an object with a letter for each."""
    for path, value in iter_values(record):
        if isinstance(value, dict) and value and part_of(path[-1:]) == "choices":
            if all(isinstance(text, str) for text in value.values()):
                return path
            continue
        is_texts = isinstance(value, list) and value and all(isinstance(v, str) for v in value)
        is_named = "choices" in (part_of((key,)) for key in path)
        if is_texts and is_named and part_of(path[-1:]) in ("choices", None):
            return path
    return None


def choose_text(
    texts: list[Text], part: Literal["request", "answer"], taken: Text | None
) -> tuple[Text | None, bool]:
    """Return the text that is most likely a part, and whether its keys say so.

    Args:
        texts: The texts.
        part: The part.
        taken: A text that is something else.
    """
    others = [text for text in texts if text is not taken]
    named = [text for text in others if text.part == part]
    if named:
        return min(named, key=lambda text: _rank(text, part)), True
    others = [text for text in others if text.part in _UNNAMED[part]]
    order = _UNNAMED[part]
    best = min(others, key=lambda t: (order.index(t.part), not t.is_prose), default=None)
    return best, False


def _rank(text: Text, part: Part) -> tuple[int, bool, bool]:
    """Return the key by which texts of the same part are sorted, the most likely first."""
    known = REQUEST_WORDS if part == "request" else ANSWER_WORDS
    is_exact = any(isinstance(key, str) and key.lower() in known for key in text.path)
    return len(text.path), not is_exact, not text.is_prose


def part_of(path: Path) -> Part | None:
    """Return what the keys of a path say about its value; the innermost one decides."""
    for key in reversed(path):
        if isinstance(key, str):
            words = words_of(key)
            for part, known in _PARTS:
                if words & known:
                    return part
            role = to_role(key)
            if role in ("user", "assistant"):
                return "request" if role == "user" else "answer"
    return None


def words_of(key: str) -> set[str]:
    """Return the words of a key, in lower case, and the whole key.

    Example:
        "Full_Answer"  ->  {"full", "answer", "full_answer"}
    """
    return split_key(key) | {key.strip().lower()}


def describe_type(value: Any) -> str:
    """Return the type of a value in words, with the keys of a dictionary."""
    kind = opaque_kind(value)
    if kind is not None:
        return f"{kind}, not text"
    if isinstance(value, dict):
        keys = [*map(shorten, value)]
        more = ", ..." if len(keys) > 6 else ""
        return f"dict with {', '.join(keys[:6])}{more}" if keys else "empty dict"
    if isinstance(value, list):
        return f"list of {len(value)} {type(value[0]).__name__}" if value else "empty list"
    return "null" if value is None else type(value).__name__


def shorten(key: str) -> str:
    """Return a key in quotes, of at most 40 characters."""
    return repr(key if len(key) <= 40 else f"{key[:37]}...")


def join_names(names: Any) -> str:
    """Return names for a comment, of many names only the first ones."""
    shown = [*names]
    more = f" and {len(shown) - _SHOWN_KEYS} more" if len(shown) > _SHOWN_KEYS else ""
    return ", ".join(shown[:_SHOWN_KEYS]) + more
