"""Columns of records that no format reads, and which of their names suggest content.

The names of others suggest that they select what is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from operator import itemgetter
from typing import Any

from sftprep.core.types import Example
from sftprep.records.conversations import CHAT_KEYS
from sftprep.records.formats import FORMATS, detect_format, keys_of
from sftprep.records.images import IMAGE_KEYS
from sftprep.records.keys.content_names import has_content_name, is_content, is_in
from sftprep.records.keys.pair_keys import is_reasoning_mode
from sftprep.records.options import Record, RecordOptions
from sftprep.records.switches import has_switch_name, is_switch
from sftprep.records.unread_turns import (
    contents_of,
    find_replaced,
    find_unread,
    has_value,
    is_repeated,
    strings_in,
)

_COLUMNS = frozenset(key for kind in FORMATS.values() for key in kind.keys | kind.optional) | {
    *("role", "label", "chosen", "rejected", "generations", "video", "videos", "audio", "audios")
}
"""Columns that are usually meant to be trained on, or to be shown to the model, besides those whose
names suggest content."""
_MOST_NAMES = 100
"""The most columns that are counted by name for one partition; the others share a name."""
_MOST_FOUND = 1000
"""The most columns that are listed for one partition, likewise."""
_OTHERS = "(others)"

_MOST_KEY_SETS = 1024
"""The most sets of keys of records that are kept, since records may have arbitrary keys."""


@dataclass(slots=True)
class _KeySet:
    """The keys of records that may not be read; most records of a file have the same keys."""

    candidates: tuple[str, ...]  # the keys with meaningful names
    others: list[str] = field(default_factory=list)  # the other ones that are not in `found` yet
    # Returns the values of these keys; None if there are no such keys.
    get_values: Callable[[Record], Any] | None = None
    # What it returned for a record without content under these keys: the columns of a table are
    # null or empty in the rows that lack them, and most rows lack the same ones.
    empty_values: Any = None

    def set_others(self, others: list[str], empty: Record) -> None:
        """Set `others`, and a record that has no content under them."""
        self.others, self.get_values = others, itemgetter(*others) if others else None
        self.empty_values = self.get_values(empty) if self.get_values is not None else None


class UnreadColumns:
    """Finds the columns of records of one format that are not read.

    Args:
        format_name: The format.
        options: How records are read.

    Attributes:
        found: The columns with content that the records examined by `find_meaningful` have and
            that are not read, in order; the values are None.
    """

    def __init__(self, format_name: str, options: RecordOptions) -> None:
        self._format, self._options = format_name, replace(options, renames=())
        self._key_sets: dict[tuple[str, ...], _KeySet] = {}  # by the keys of a record
        self.found: dict[str, None] = {}
        self._names: set[str] = set()  # of columns that were found

    def find_meaningful(self, record: Record, example: Example) -> list[str]:
        """Return the columns of a record that are not read, although the names suggest content.

        Args:
            record: The record, after keys were renamed.
            example: What was read of it.
        """
        replaced = [] if example.replaced is None else self._find_replaced(example)
        keys = tuple(record)
        key_set = self._key_sets.get(keys)
        if key_set is None:
            key_set = self._sort_keys(keys)
        get_values = key_set.get_values
        if get_values is not None and get_values(record) != key_set.empty_values:
            self._note_filled(record, example, key_set)
        if not key_set.candidates:
            return replaced
        meaningful = replaced
        for key, is_meaningful in self.find(record, example, key_set.candidates):
            self._note(key)
            if is_meaningful:
                meaningful.append(self._name_of(key))
        return meaningful

    def find(
        self, record: Record, example: Example, keys: Collection[str]
    ) -> Iterator[tuple[str, bool]]:
        """Yield the keys that are not read, and whether they appear to carry meaning."""
        format_name, options = self._format, self._options
        if any(record.get(key) is None for key in keys_of(format_name, options)):
            # A conversation under the key of another layout.
            format_name = detect_format(record, options) or format_name
        kind = FORMATS[format_name]
        certain = kind.keys | (kind.optional & (CHAT_KEYS | {"history"}))
        if kind.kind == "text":
            certain |= {options.text_field}
        if example.prompt is not None:  # joined as text
            certain -= {"tools", "functions", "chat_template_kwargs"}
        if record.get("tools"):
            certain -= {"functions"}
        if kind.kind == "tokens":
            certain |= kind.optional | {"text"}
        texts: str | None = None
        for key in keys:
            value = record[key]
            if key in IMAGE_KEYS or not has_value(value):
                continue
            if _equals_first_message(value, example):
                continue
            if texts is None:
                texts = "\n".join(strings_in(contents_of(example)))
            if key in certain:
                if _is_unused(key, value, example, texts):
                    yield key, _is_meaningful(key, value)
                continue
            is_shown = is_repeated(value, texts) or (
                isinstance(value, str) and _contains_all(value, record, kind.keys | kind.optional)
            )
            if not (is_shown and key in kind.optional):
                has_meaning = _is_meaningful(key, value) and not is_shown
                yield key, has_meaning or is_switch(key, value)

    def _find_replaced(self, example: Example) -> list[str]:
        found = find_replaced(example)
        for key in found:
            self._note(key)
        return [*map(self._name_of, found)]

    def _note_filled(self, record: Record, example: Example, key_set: _KeySet) -> None:
        """Note the columns with a value, which need not be examined again."""
        remaining = []
        for key in key_set.others:
            if has_value(record[key]) and not _equals_first_message(record[key], example):
                self._note(key)
            else:
                remaining.append(key)
        key_set.set_others(remaining, record)

    def _note(self, key: str) -> None:
        self.found[key if key in self.found or len(self.found) < _MOST_FOUND else _OTHERS] = None

    def _name_of(self, key: str) -> str:
        if key not in self._names and len(self._names) >= _MOST_NAMES:
            return _OTHERS
        self._names.add(key)
        return key

    def _sort_keys(self, keys: tuple[str, ...]) -> _KeySet:
        """Return and keep the keys of a record in groups."""
        read = keys_of(self._format, self._options)
        if FORMATS[self._format].kind == "conversation":
            read |= {"tools", "chat_template_kwargs"}
        candidates = tuple(
            key for key in keys if has_counted_name(key) and key not in read | IMAGE_KEYS
        )
        if len(self._key_sets) >= _MOST_KEY_SETS:
            self._key_sets.clear()
        key_set = self._key_sets[keys] = _KeySet(candidates)
        known = {*candidates, *read, *IMAGE_KEYS, *self.found}
        key_set.set_others([key for key in keys if key not in known], dict.fromkeys(keys))
        return key_set


@lru_cache(maxsize=4096)
def has_counted_name(key: str) -> bool:
    """Return whether the records with a value under a key are counted, unless it is read."""
    return key.lower() in _COLUMNS or has_content_name(key) or has_switch_name(key)


def _is_meaningful(key: str, value: Any) -> bool:
    """Return whether a column appears to have content."""
    if isinstance(value, str | bool) and is_reasoning_mode(key, value):
        return False
    return key.lower() in _COLUMNS or is_content(key, value)


def _contains_all(value: str, record: Record, keys: frozenset[str]) -> bool:
    """Return whether a text contains all texts that are read, like `text` of Stanford Alpaca."""
    read = [item for key in keys if key in record for item in strings_in(record[key])]
    others = [text.strip() for text in read if text is not value]
    return len(others) > 1 and all(is_in(text, value) for text in others)


def _equals_first_message(value: Any, example: Example) -> bool:
    """Return whether a value equals the content of the first message.

    This holds for most system prompts.
    """
    messages = example.messages
    return bool(messages) and value == messages[0].get("content")  # type: ignore[index]


def _is_unused(key: str, value: Any, example: Example, texts: str) -> bool:
    """Return whether a system prompt or a history is not used.

    The conversation may have another system prompt, and a history may be in another layout.
    """
    if key == "history":
        return not all(is_in(text, texts) for text in strings_in(value))
    if not key.startswith("system"):
        return False
    messages = example.messages
    shown = str(messages[0].get("content")) if messages else texts
    if messages and isinstance(value, list | dict):
        turn = value if isinstance(value, dict) else {"content": value}
        if find_unread([turn], messages[:1])[0]:
            return True
    return not all(is_in(text, shown) for text in _texts_of_parts(value))


def _texts_of_parts(value: Any) -> Iterator[str]:
    """Yield the texts of a system prompt: a string, or parts in the layouts of Anthropic or Gemini.

    Example:
        [{"type": "text", "text": "Be brief."}]  ->  "Be brief."
    """
    if isinstance(value, list):
        for part in value:
            yield from _texts_of_parts(part)
    elif isinstance(value, dict):
        contents = [value[key] for key in ("content", "parts", "text") if value.get(key)]
        yield from _texts_of_parts(contents) if contents else strings_in(value)
    elif isinstance(value, str):
        yield value
