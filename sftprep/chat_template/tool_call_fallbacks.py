"""Alternative forms of tools and tool calls.

They are for templates that reject the form in the record. Templates differ in whether they take the
arguments of a call as an object or as JSON text, in whether a message with tool calls may lack
content, and in whether a call and the schema of a tool are wrapped as `{"type": "function",
"function": {...}}`.

If the template rejects all forms, `find_unusual` says what in the conversation is unusual: the
error of a template names neither the message nor the value.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from sftprep.chat_template.reference.rendering import REASONING_KEYS
from sftprep.core.json_values import describe_json_type
from sftprep.core.types import Message, function_of


def alternative_forms(
    messages: list[Message], tools: list[Any] | None
) -> list[tuple[list[Message], list[Any] | None]]:
    """Return the alternatives to rejected forms of messages and tools.

    These are: all arguments as objects or all as JSON text, empty content where a message with tool
    calls has none, wrapped calls, wrapped tools, and the combinations. Forms that change nothing
    are left out.
    """
    forms: list[list[Message]] = [messages]
    for calls in (messages, _convert_calls(messages, _wrap_call)):
        contents = _fill_contents(calls)
        for form in (
            calls,
            _convert_arguments(calls, _to_text),
            _convert_arguments(calls, _to_object),
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


def _convert_calls(messages: list[Message], convert: Callable[[Any], Any]) -> list[Message]:
    return [
        {**message, "tool_calls": [convert(call) for call in message["tool_calls"]]}
        if isinstance(message.get("tool_calls"), list)
        else message
        for message in messages
    ]


def _convert_arguments(messages: list[Message], convert: Callable[[Any], Any]) -> list[Message]:
    def convert_call(call: Any) -> Any:
        function = function_of(call)
        if not isinstance(function, dict):
            return call
        converted = {**function, "arguments": convert(function.get("arguments", {}))}
        return {**call, "function": converted} if "function" in call else converted

    return _convert_calls(messages, convert_call)


def _wrap_call(call: Any) -> Any:
    """Return a call as OpenAI writes it; LangChain has no `function` around name and arguments."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict) and "type" not in call:
        return {"type": "function", **call}
    if "name" not in call or "function" in call:
        return call
    function = {key: call[key] for key in ("name", "arguments") if key in call}
    rest = {key: value for key, value in call.items() if key not in (*function, "type")}
    return {**rest, "type": "function", "function": function}


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


def find_unusual(messages: list[Message], tools: list[Any] | None) -> str | None:
    """Describe the first value that templates do not expect, or return None.

    Example:
        [{"role": "user", "content": "a", "reasoning": ["b"]}]  ->
            'the "reasoning" of message 1 is an array, not text'
    """
    for number, tool in enumerate(tools or (), 1):
        function = function_of(tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            keys = ", ".join(f'"{key}"' for key in function) if isinstance(function, dict) else ""
            return (
                f'tool {number} has no "name"'
                + (f", but {keys}" if keys else "")
                + '; tools are written as {"type": "function", "function": {"name": ...,'
                ' "description": ..., "parameters": ...}}'
            )
        parameters = function.get("parameters")
        if parameters is not None and not isinstance(parameters, dict):
            kind = describe_json_type(parameters)
            return f'the "parameters" of tool {number} are {kind}, not a JSON schema'
    for number, message in enumerate(messages, 1):
        for key in ("content", "name", *REASONING_KEYS):
            if isinstance(message.get(key), dict | list | int | float):
                kind = describe_json_type(message[key])
                return f'the "{key}" of message {number} is {kind}, not text'
    return None
