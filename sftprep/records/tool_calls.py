"""The tool calls of messages, and the schemas of tools, in the layouts of public data sets."""

from __future__ import annotations

from operator import is_
from typing import Any

from sftprep.core.types import Message
from sftprep.records.options import InvalidRecord, parse_if_string

_CALL_KEYS = frozenset({"tool_calls", "function_call"})
_ARGUMENT_KEYS = ("arguments", "parameters", "args", "input")
"""Keys of the arguments of a call: those of OpenAI, Llama, LangChain and Anthropic."""


def parse_calls(value: Any, what: str) -> list[dict[str, Any]]:
    """Return the tool calls in a value, which is a call or a list of calls, or JSON text of them.

    Raises:
        InvalidRecord: The text is not JSON, the list is empty, or a call has no name.
    """
    calls = parse_if_string(value, what)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls:
        raise InvalidRecord("bad_tool", f"{what} has no call")
    return [_parse_call(call, what) for call in calls]


def is_call(value: Any) -> bool:
    """Return whether a value is an object with the name of a function and its arguments."""
    function = value.get("function", value) if isinstance(value, dict) else None
    return (
        isinstance(function, dict)
        and isinstance(function.get("name"), str)
        and any(key in function for key in _ARGUMENT_KEYS)
    )


def clean_calls(message: Message, where: str) -> Message:
    """Return a message with `tool_calls` as a list of calls with `arguments`, or without any.

    Empty and null calls are removed, because templates distinguish them from an absent key. The
    older `function_call` of OpenAI becomes a call.

    Raises:
        InvalidRecord: The calls are JSON text that is not valid.
    """
    calls = message.get("tool_calls") or None
    legacy = message.get("function_call") or None
    if type(calls) is str:
        calls = parse_if_string(calls, f"tool_calls of {where}")
    if calls:
        calls = calls if type(calls) is list else [calls]
        named = [_with_arguments(call) for call in calls]
        if calls is message["tool_calls"] and all(map(is_, named, calls)):
            return message
    elif legacy and (legacy := parse_if_string(legacy, f"function_call of {where}")):
        named = parse_calls(legacy, f"function_call of {where}")
    elif _CALL_KEYS.isdisjoint(message):
        return message
    else:
        named = []
    rest = {key: value for key, value in message.items() if key not in _CALL_KEYS}
    return {**rest, "tool_calls": named} if named else rest


def read_tools(tools: Any) -> list[Any] | None:
    """Return tool schemas as objects, whether they are objects or JSON strings.

    An empty list becomes None, because templates distinguish the two.
    """
    if isinstance(tools, str) and not tools.strip():
        return None
    tools = parse_if_string(tools, '"tools"')
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise InvalidRecord("bad_tool", '"tools" is not a list of tool schemas')
    return [parse_if_string(tool, "a tool schema") for tool in tools] or None


def read_functions(functions: Any) -> list[Any] | None:
    """Return the schemas under the older key `functions` of OpenAI as tools."""
    return [
        tool
        if isinstance(tool, dict) and "function" in tool
        else {"type": "function", "function": tool}
        for tool in read_tools(functions) or ()
    ] or None


def _parse_call(call: Any, what: str) -> dict[str, Any]:
    # A call is {"function": {"name", "arguments"}}, as in OpenAI's API, or the inner object alone.
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or "name" not in function:
        raise InvalidRecord("bad_tool", f"{what} has no name")
    named = {"name": function["name"], "arguments": _arguments(function)}
    parsed = {"type": "function", "function": named}
    return {"id": call["id"], **parsed} if isinstance(call.get("id"), str) else parsed


def _arguments(function: dict[str, Any]) -> Any:
    return next((function[key] for key in _ARGUMENT_KEYS if key in function), {})


def _with_arguments(call: Any) -> Any:
    """Return a call whose arguments have the key that templates read."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or "arguments" in function:
        return call
    other = next((key for key in _ARGUMENT_KEYS if key in function), None)
    if other is None:
        return call
    renamed = {("arguments" if key == other else key): v for key, v in function.items()}
    return {**call, "function": renamed} if "function" in call else renamed
