"""Alternative forms of tools and tool calls.

They are for templates that reject the form in the record. Templates differ in whether they take the
arguments of a call as an object or as JSON text, in whether a message with tool calls may lack
content, and in whether the schema of a tool is wrapped as `{"type": "function", "function":
{...}}`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from sftprep.core.types import Message, function_of


def alternative_forms(
    messages: list[Message], tools: list[Any] | None
) -> list[tuple[list[Message], list[Any] | None]]:
    """Return the alternatives to rejected forms of messages and tools.

    These are: all arguments as objects or all as JSON text, empty content where a message with tool
    calls has none, wrapped tools, and the combinations. Forms that change nothing are left out.
    """
    contents = _fill_contents(messages)
    forms: list[list[Message]] = [messages]
    for form in (
        _convert_arguments(messages, _to_text),
        _convert_arguments(messages, _to_object),
        contents,
        _convert_arguments(contents, _to_text),
        _convert_arguments(contents, _to_object),
    ):
        if form not in forms:
            forms.append(form)
    same_tools = [(form, tools) for form in forms[1:]]
    wrapped = tools and [_wrap_tool(tool) for tool in tools]
    if wrapped == tools:
        return same_tools
    # First the tools alone, since no form of the messages helps a template that refuses flat tools.
    return [(messages, wrapped), *same_tools, *((form, wrapped) for form in forms[1:])]


def _fill_contents(messages: list[Message]) -> list[Message]:
    """Set missing contents of messages with tool calls to "", as OpenAI does."""
    return [
        {**message, "content": ""}
        if message.get("content") is None and message.get("tool_calls")
        else message
        for message in messages
    ]


def _convert_arguments(messages: list[Message], convert: Callable[[Any], Any]) -> list[Message]:
    return [
        {**message, "tool_calls": [_convert_call(call, convert) for call in message["tool_calls"]]}
        if isinstance(message.get("tool_calls"), list)
        else message
        for message in messages
    ]


def _convert_call(call: Any, convert: Callable[[Any], Any]) -> Any:
    function = function_of(call)
    if not isinstance(function, dict):
        return call
    converted = {**function, "arguments": convert(function.get("arguments", {}))}
    return {**call, "function": converted} if "function" in call else converted


def _to_text(arguments: Any) -> Any:
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments


def _to_object(arguments: Any) -> Any:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments


def _wrap_tool(tool: Any) -> Any:
    if not isinstance(tool, dict) or "name" not in tool or "function" in tool:
        return tool
    return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}
