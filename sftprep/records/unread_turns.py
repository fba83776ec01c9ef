"""Texts and switches of turns that are not read, so that they are counted.

A turn is read by the keys that its layout is known to have. What remains is found by its value: a
text of the turn is read if it is in a key of the message that templates show.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from typing import Any

import orjson

from sftprep.chat_template.reference.rendering import REASONING_KEYS
from sftprep.core.json_values import iter_leaves
from sftprep.core.types import Example, Message, function_of
from sftprep.records.keys.content_names import (
    WORDS_OF_METADATA,
    is_content,
    is_in,
    is_prose,
    is_text,
)
from sftprep.records.keys.pair_keys import split_key
from sftprep.records.options import opaque_kind
from sftprep.records.roles import TOOL_CALL, to_role
from sftprep.records.switches import SWITCH_KEYS, is_switch

_TEXT_KEYS = ("name", "tool_call_id", *REASONING_KEYS)
"""Keys of messages whose values are read if they are strings."""
_READ_KEYS = SWITCH_KEYS | {"role", "from", "tool_calls", "function_call", *_TEXT_KEYS}
"""Keys of turns that are read, besides the content."""
_KEYS_OF_CALLS = frozenset({"id", "type", "index", "function", "name", "arguments"})
_READ_KEYS_OF_MESSAGES = _READ_KEYS | {"content"}
_READ_KEYS_OF_VALUES = _READ_KEYS | {"value"}
_CONTENT_KEYS = ("content", "value", "text", "parts", "message")
_CALL_KEYS = ("tool_calls", "function_call")
_MOST_WORK = 1 << 28
"""The largest product of texts and characters of the strings that are searched."""
_METADATA = frozenset(
    {
        *("id", "model", "date", "created", "created_at", "timestamp", "source", "url"),
        *("lang", "language"),
    }
)
"""Keys at any depth whose values describe a turn and are not a part of it, except prose."""
_WORDS_OF_TURN_METADATA = WORDS_OF_METADATA | {"index", "reason", "timestamp"}


def find_unread(turns: Any, messages: list[Message]) -> tuple[tuple[str, ...], bool]:
    """Return the texts that the messages of turns lack, and whether they lack a switch.

    Args:
        turns: The turns of a record, or JSON text of them.
        messages: The messages that were read from them.

    Example:
        turns = [{"from": "human", "value": "a", "note": "keep it short", "mask": True}]  ->
            (("keep it short",), True)
    """
    if type(turns) is str and turns.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            turns = json.loads(turns)
    if type(turns) is not list:
        return (), False
    partly_read = [turn for turn in turns if not _is_read_whole(turn)]
    if not partly_read:
        return (), False
    read = [
        text.strip()
        for message in messages
        for value in _values_read(message)
        for text in _strings_in(value, with_json=True)
    ]
    unread = _find_unread_texts(partly_read, read)
    unread |= dict.fromkeys(_find_unread_words(partly_read, frozenset(read)))
    return tuple(unread), any(map(_has_unread_switch, partly_read))


def _find_unread_texts(turns: list[Any], read: list[str]) -> dict[str, None]:
    """Return the texts of turns that are neither one of the strings read nor a part of one.

    The search for parts is quadratic, so it ends after `_MOST_WORK`. One unread text is enough to
    count a record.
    """
    whole, joined = set(read), "\0".join(read)
    unread: dict[str, None] = {}
    searches_left = 1 + _MOST_WORK // (1 + len(joined))
    for text in map(str.strip, _strings_in(turns)):
        if text in whole or not is_text(text):
            continue
        if searches_left == 0:
            break
        searches_left -= 1
        if text not in joined:
            unread[text] = None
    return unread


def _find_unread_words(turns: list[Any], read: frozenset[str]) -> Iterator[str]:
    """Yield the single words and numbers of turns that are content and not read.

    They are content under a key whose name suggests it, and in a turn without any other content.
    """
    for turn in turns:
        if type(turn) is not dict:
            continue
        has_content = any(turn.get(key) for key in (*_CONTENT_KEYS, *_CALL_KEYS))
        for key, value in turn.items():
            if key in _READ_KEYS or key in _METADATA or is_switch(key, value):
                continue
            if key in _CONTENT_KEYS and isinstance(value, dict | list):  # typed parts
                continue
            if is_content(key, value) or (
                not has_content and _WORDS_OF_TURN_METADATA.isdisjoint(split_key(key))
            ):
                yield from (word for word in _iter_words(value) if word not in read)


def _iter_words(value: Any) -> Iterator[str]:
    """Yield the strings and numbers in a JSON value, as strings."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            stack.extend(inner for key, inner in item.items() if key not in _METADATA)
        elif isinstance(item, list):
            stack.extend(item)
        elif isinstance(item, str):
            if item.strip() and not is_text(item) and not item.startswith(("{", "[")):
                yield item.strip()
        elif type(item) in (int, float):
            yield str(item)


def find_replaced(example: Example) -> list[str]:
    """Return the keys with content that renamed keys replaced, and that is not read elsewhere."""
    texts = "\n".join(strings_in(contents_of(example)))
    return [
        key
        for key, value in (example.replaced or {}).items()
        if has_value(value) and not is_repeated(value, texts)
    ]


def has_value(value: Any) -> bool:
    """Return whether a JSON value has a value in it besides null and ""."""
    return any(leaf is not None and leaf != "" for leaf in iter_leaves(value))


def is_repeated(value: Any, texts: str) -> bool:
    """Return whether all texts of a value are in the texts of its example, as words of their own.

    A placeholder of bytes or images has none.
    """
    strings = [] if opaque_kind(value) else [*strings_in(value)]
    return bool(strings) and all(is_in(text, texts) for text in strings)


def strings_in(value: Any) -> Iterator[str]:
    """Yield the strings in a JSON value."""
    return (leaf for leaf in iter_leaves(value) if isinstance(leaf, str))


def contents_of(example: Example) -> list[Any]:
    """Return everything that was read of a record."""
    return [example.text, example.prompt, example.completion, example.messages, example.tools]


def _is_read_whole(turn: Any) -> bool:
    """Return whether all keys of a turn are read, or cannot hold a text."""
    if type(turn) is not dict:
        return type(turn) is str
    has_text_keys = not turn.keys().isdisjoint(_TEXT_KEYS)
    if has_text_keys and any(turn.get(k) and type(turn[k]) is not str for k in _TEXT_KEYS):
        return False
    if turn.get("tool_calls") and not _are_plain_calls(turn["tool_calls"]):
        return False
    if to_role(turn.get("role") or turn.get("from")) == TOOL_CALL:
        return turn.keys() == {"from", "value"} and _is_plain_call_text(turn["value"])
    content = turn.get("content")
    if type(content) is str or (content is None and turn.get("tool_calls")):
        return turn.keys() <= _READ_KEYS_OF_MESSAGES
    return type(turn.get("value")) is str and turn.keys() <= _READ_KEYS_OF_VALUES


def _are_plain_calls(calls: Any) -> bool:
    """Return whether calls have names and arguments, and nothing else with a meaning."""
    return type(calls) is list and all(
        type(call) is dict
        and type(function := function_of(call)) is dict
        and call.keys() <= _KEYS_OF_CALLS
        and function.keys() <= _KEYS_OF_CALLS
        for call in calls
    )


def _is_plain_call_text(text: Any) -> bool:
    """Return whether JSON text is a call, or a list of calls, with nothing else in it."""
    if type(text) is not str:
        return False
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return bool(value) and _are_plain_calls(value if type(value) is list else [value])


def _values_read(message: Message) -> Iterator[Any]:
    """Yield the values of a message that the conservation check looks for."""
    yield message.get("content")
    for call in message.get("tool_calls") or ():
        function = function_of(call)
        if isinstance(function, dict):
            yield from (function.get("name"), function.get("arguments"))
    yield from (message[key] for key in _TEXT_KEYS if isinstance(message.get(key), str))


def _strings_in(value: Any, *, with_json: bool = False) -> Iterator[str]:
    """Yield the strings in a JSON value, and those in JSON text inside it.

    Args:
        value: The value.
        with_json: Whether the JSON text itself is yielded as well.
    """
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            parsed = None
            if item.startswith(("{", "[")):
                with suppress(ValueError, RecursionError):
                    parsed = json.loads(item)
            if parsed is not None:
                stack.append(parsed)
            if parsed is None or with_json:
                yield item
        elif isinstance(item, dict):
            stack.extend(
                inner
                for key, inner in item.items()
                if key not in _METADATA or not isinstance(inner, str) or is_prose(inner)
            )
        elif isinstance(item, list):
            stack.extend(item)


def _has_unread_switch(turn: Any) -> bool:
    """Return whether a turn has a switch that is not read.

    The switch may be in a part of its content, or in an object under a key that is not read.
    """
    if type(turn) is not dict:
        return False
    contents = [value for value in turn.values() if type(value) is list]
    parts = [part for part in chain.from_iterable(contents) if type(part) is dict]
    known = _READ_KEYS_OF_MESSAGES | _READ_KEYS_OF_VALUES
    parts += [value for key, value in turn.items() if type(value) is dict and key not in known]
    return any(is_switch(*item) for item in turn.items() if item[0] not in SWITCH_KEYS) or any(
        is_switch(*item) for part in parts for item in part.items()
    )
