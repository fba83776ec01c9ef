"""Checks of the tool calls in a conversation.

A template writes calls as they are, so a call without a name, or with arguments that are not JSON,
would become a target of training.
"""

from __future__ import annotations

from typing import Any

import orjson

from sftprep.core.types import Message, function_of
from sftprep.records.options import InvalidRecord, check_keys


def check_calls(messages: list[Message], tools: list[Any] | None) -> bool:
    """Check the tool calls of a conversation.

    Arguments without content become `{}` in place.

    Args:
        messages: The messages.
        tools: The schemas of the tools that the conversation may call; None if it lists none.

    Returns:
        Whether a call is of a tool that is not in the list.

    Raises:
        InvalidRecord: A call has no name, or its arguments are not a JSON object.
    """
    names = {
        _check_call(call, f"call {number} of message {position}")
        for position, message in enumerate(messages, 1)
        for number, call in enumerate(_calls_of(message, position), 1)
    }
    return bool(names and tools) and not names <= _names_of(tools or [])


def _calls_of(message: Message, position: int) -> list[Any]:
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise InvalidRecord("bad_tool", f'"tool_calls" of message {position} is not a list')
    return calls


def _check_call(call: Any, label: str) -> str:
    """Return the name of a call."""
    function = function_of(call)
    if not isinstance(function, dict):
        raise InvalidRecord("bad_tool", f"{label} is {_kind_of(function)}, not an object")
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        raise InvalidRecord("bad_tool", f"{label} has no name")
    if "arguments" in function:
        function["arguments"] = _check_arguments(function["arguments"], f"{label} ({name!r})")
    return name


def _check_arguments(arguments: Any, label: str) -> Any:
    """Return arguments in their own form, an object or JSON text of one."""
    if isinstance(arguments, dict):
        return arguments
    if arguments is None:
        return {}
    if not isinstance(arguments, str):
        raise InvalidRecord(
            "bad_tool", f"the arguments of {label} are {_kind_of(arguments)}, not an object"
        )
    if not arguments.strip():
        return "{}"
    try:
        value = orjson.loads(arguments)
    except orjson.JSONDecodeError as error:
        raise InvalidRecord(
            "bad_tool", f"the arguments of {label} are not JSON: {error}"
        ) from error
    check_keys(arguments, value, f"the arguments of {label}")
    if isinstance(value, dict):
        return arguments
    problem = (
        "are JSON text inside JSON text: they were encoded twice"
        if isinstance(value, str)
        else f"are JSON text of {_kind_of(value)}, not of an object"
    )
    raise InvalidRecord("bad_tool", f"the arguments of {label} {problem}")


def _kind_of(value: Any) -> str:
    """Return the kind of a JSON value other than an object."""
    kinds = {str: "a string", list: "an array", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")


def _names_of(tools: list[Any]) -> set[str]:
    """Return the names in tools of any layout, such as those of Gemini and Bedrock."""
    names: set[str] = set()
    stack: list[Any] = [*tools]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            name = item.get("name")
            names |= {name} if isinstance(name, str) else set()
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
    return names
