"""Tool calls of messages, in public layouts."""

from __future__ import annotations

import json
from contextlib import suppress
from operator import is_
from typing import Any

from sftprep.core.types import Message, function_of
from sftprep.records.options import InvalidRecord, parse_if_string

_CALL_KEYS = frozenset({"tool_calls", "function_call"})
_ARGUMENT_KEYS = ("arguments", "parameters", "args", "input", "kwargs")
"""Keys of the arguments of a call: those of OpenAI, Llama, LangChain and Anthropic."""
_NOT_ARGUMENTS = frozenset({"function", "name", "id", "type", "index"})
_OUTER_KEYS = frozenset({"function", "id", "type", "index"})
"""The usual keys of a call, whose function has the others."""
_USUAL_KEYS = _OUTER_KEYS | {"name", "arguments"}


def parse_calls(value: Any, label: str) -> list[dict[str, Any]]:
    """Parse tool calls: a call, a list of calls, or JSON text of them.

    Raises:
        InvalidRecord: The text is not JSON, the list is empty, or a call has no name.
    """
    calls = parse_if_string(value, label)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls:
        raise InvalidRecord("bad_tool", f"{label} has no call")
    return [_parse_call(call, label) for call in calls]


def is_call(value: Any) -> bool:
    """Return whether a value is an object with a function's name and arguments."""
    function = function_of(value)
    return (
        isinstance(function, dict)
        and isinstance(function.get("name"), str)
        and any(key in function for key in _ARGUMENT_KEYS)
    )


def clean_calls(message: Message, where: str) -> Message:
    """Convert `tool_calls` to a list of calls with `arguments`, or remove the key.

    Empty and null calls are removed, because templates distinguish them from an absent key. The
    older `function_call` of OpenAI becomes a call.

    Raises:
        InvalidRecord: The calls are JSON text that is not valid.
    """
    calls = message.get("tool_calls") or None
    legacy = message.get("function_call") or None
    if type(calls) is str:
        calls = parse_if_string(calls, f"tool_calls of {where}")
    if legacy and _is_empty(parse_if_string(legacy, f"function_call of {where}")):
        legacy = None
    if type(calls) is dict:
        calls = [calls]
    if type(calls) is list and any(map(_is_empty, calls)):
        calls = [call for call in calls if not _is_empty(call)]
    if calls:
        calls = calls if type(calls) is list else [calls]
        named = [_with_arguments(call, f"tool_calls of {where}") for call in calls]
        if legacy and not any(_is_same_call(legacy, call) for call in named):
            raise InvalidRecord("bad_tool", f"{where} has tool_calls and another function_call")
        if not legacy and calls is message["tool_calls"] and all(map(is_, named, calls)):
            return message
    elif legacy and (legacy := parse_if_string(legacy, f"function_call of {where}")):
        named = parse_calls(legacy, f"function_call of {where}")
    elif _CALL_KEYS.isdisjoint(message):
        return message
    else:
        named = []
    rest = {key: value for key, value in message.items() if key not in _CALL_KEYS}
    return {**rest, "tool_calls": named} if named else rest


def _is_empty(value: Any) -> bool:
    """Return whether a call is null or has no value, as in a table with the columns of calls."""
    if isinstance(value, dict):
        return all(map(_is_empty, value.values()))
    return value == "" or _is_null(value)


def _parse_call(call: Any, label: str) -> dict[str, Any]:
    function = function_of(call)
    if not isinstance(function, dict) or "name" not in function:
        raise InvalidRecord("bad_tool", f"{label} has no name")
    _check_name(call, function, label)
    named = {"name": function["name"], "arguments": _arguments(call, function, label)}
    parsed = {"type": "function", "function": named}
    return {"id": call["id"], **parsed} if isinstance(call.get("id"), str) else parsed


def _check_name(call: dict[str, Any], function: dict[str, Any], label: str) -> None:
    """Raise InvalidRecord if a call has another name than its function."""
    name = call.get("name")
    if name and name != function.get("name"):
        raise InvalidRecord("bad_tool", f"{label} has different names in a call and its function")


def _arguments(call: dict[str, Any], function: dict[str, Any], label: str) -> Any:
    """Return the arguments of a call, under whichever key they are.

    Raises:
        InvalidRecord: There are different arguments under two keys, or only an object under a key
            that is not known to hold them.
    """
    places = [function] if function is call else [function, call]
    filled = [
        place[key]
        for key in _ARGUMENT_KEYS
        for place in places
        if place.get(key) and not _is_null(place[key])
    ]
    if any(_parse_arguments(value) != _parse_arguments(filled[0]) for value in filled):
        raise InvalidRecord("bad_tool", f"{label} has different arguments under several keys")
    if filled:
        return filled[0]
    present = [place[key] for key in _ARGUMENT_KEYS for place in places if key in place]
    if present:
        return None if _is_null(present[0]) else present[0]
    for place in places:
        for key, value in place.items():
            if key not in _NOT_ARGUMENTS and value and isinstance(value, (dict, list)):
                raise InvalidRecord("bad_tool", f"{label} has no arguments, but {key!r}")
    return {}


def _is_null(arguments: Any) -> bool:
    return arguments is None or (isinstance(arguments, str) and arguments.strip() == "null")


def _with_arguments(call: Any, label: str) -> Any:
    """Return a call with its arguments under the key read by templates."""
    if isinstance(call, dict) and call.get("function", call) is None:
        call = {key: value for key, value in call.items() if key != "function"}
    function = function_of(call)
    if not isinstance(function, dict):
        return call
    # Most calls have their arguments where templates expect them, and nothing else.
    present = function.get("arguments")
    is_filled = bool(present) and not _is_null(present)
    usual_keys = _USUAL_KEYS if function is call else _OUTER_KEYS
    if is_filled and function.keys() <= _USUAL_KEYS and call.keys() <= usual_keys:
        return call
    _check_name(call, function, label)
    arguments = _arguments(call, function, label)
    keys = [key for key in _ARGUMENT_KEYS if key in function or key in call]
    is_in_place = keys == ["arguments"] and "arguments" in function
    if not keys or (is_in_place and arguments is present):
        return call
    rest = {key: value for key, value in function.items() if key not in _ARGUMENT_KEYS}
    renamed = {**rest, "arguments": arguments}
    outer = {key: value for key, value in call.items() if key not in _ARGUMENT_KEYS}
    return {**outer, "function": renamed} if "function" in call else renamed


def _is_same_call(one: Any, other: Any) -> bool:
    """Return whether two calls have the same name and arguments.

    A call without a function has neither.
    """
    pairs = []
    for call in (one, other):
        found = function_of(call)
        function = found if isinstance(found, dict) else {}
        pairs.append((function.get("name"), _parse_arguments(function.get("arguments"))))
    return pairs[0] == pairs[1]


def _parse_arguments(arguments: Any) -> Any:
    """Return arguments as values, if they are JSON text."""
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):
            return json.loads(arguments)
    return arguments
