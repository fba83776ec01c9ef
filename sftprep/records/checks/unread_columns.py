"""Columns of records that no format reads, although their names suggest content."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

from sftprep.core.types import Example
from sftprep.records.conversations import CHAT_KEYS
from sftprep.records.formats import FORMATS, detect_format, keys_of
from sftprep.records.images import IMAGE_KEYS, is_filled
from sftprep.records.options import Record, RecordOptions

_MEANINGFUL = (
    frozenset(key for kind in FORMATS.values() for key in kind.keys | kind.optional)
    | {"role", "code", "choices", "options", "label", "hint", "explanation", "rationale"}
    | {"cot", "think", "thought", "chosen", "rejected", "answers", "solutions", "generations"}
    | {"video", "videos", "audio", "audios"}
)
"""Keys whose values are usually meant to be trained on, or to be shown to the model."""

_MOST_KEY_SETS = 1024
"""The most sets of keys of records that are kept, since records may have arbitrary keys."""


class UnreadColumns:
    """Finds the columns of records of one format that are not read.

    Args:
        format_name: The format.
        options: How records are read.
    """

    def __init__(self, format_name: str, options: RecordOptions) -> None:
        self._format, self._options = format_name, replace(options, renames=())
        # The meaningful columns among the keys of a record that may not be read; most records of a
        # file have the same keys.
        self._candidates: dict[tuple[str, ...], tuple[str, ...]] = {}

    def meaningful(self, record: Record, example: Example) -> list[str]:
        """Return the columns of a record that are not read, although the names suggest content.

        Args:
            record: The record, after keys were renamed.
            example: What was read of it.
        """
        keys = tuple(record)
        candidates = self._candidates.get(keys)
        if candidates is None:
            candidates = self._find_candidates(keys)
        if not candidates:
            return []
        found = self.find(record, example, candidates)
        return [key for key, is_meaningful in found if is_meaningful]

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
            if key in IMAGE_KEYS or not (is_filled(value) or type(value) in (int, float)):
                continue
            if _equals_first_message(value, example):
                continue
            if texts is None:
                texts = "\n".join(strings_in(_contents(example)))
            if key in certain:
                if _is_unused(key, value, example, texts):
                    yield key, key.lower() in _MEANINGFUL
                continue
            # Many data sets repeat a part of the conversation in another column.
            is_repeated = isinstance(value, str) and value.strip() in texts
            if not (is_repeated and key in kind.optional):
                yield key, key.lower() in _MEANINGFUL and not is_repeated

    def _find_candidates(self, keys: tuple[str, ...]) -> tuple[str, ...]:
        read = keys_of(self._format, self._options)
        if FORMATS[self._format].kind == "conversation":
            read |= {"tools", "chat_template_kwargs"}
        candidates = tuple(
            key for key in keys if key.lower() in _MEANINGFUL and key not in read | IMAGE_KEYS
        )
        if len(self._candidates) >= _MOST_KEY_SETS:
            self._candidates.clear()
        self._candidates[keys] = candidates
        return candidates


def strings_in(value: Any) -> Iterator[str]:
    """Yield the strings in a JSON value."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)


def _contents(example: Example) -> list[Any]:
    return [example.text, example.prompt, example.completion, example.messages, example.tools]


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
        return not all(text.strip() in texts for text in strings_in(value))
    if not key.startswith("system") or not isinstance(value, str):
        return False
    messages = example.messages
    return value.strip() not in (str(messages[0].get("content")) if messages else texts)
