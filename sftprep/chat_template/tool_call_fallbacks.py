"""Alternative forms of tool calls, for templates that reject the form in the record.

Templates differ in whether they take the arguments of a call as an object or as JSON text, and in
whether a message with tool calls may lack content.
"""

from __future__ import annotations

import json
from typing import Any

from sftprep.core.types import Message


def alternative_messages(messages: list[Message]) -> list[list[Message]]:
    """Return the alternative forms of messages that a template rejects.

    These are: arguments in the other form, empty content where a message with tool calls has none,
    and both. A form that changes nothing is left out.
    """
    arguments, contents = _convert_arguments(messages), _fill_contents(messages)
    both = _fill_contents(arguments) if arguments is not None else None
    return [form for form in (arguments, contents, both) if form is not None]


def _fill_contents(messages: list[Message]) -> list[Message] | None:
    """Set the content of messages with tool calls to "" where they have none, as OpenAI does.

    Returns None if all of them have content.
    """
    lacks_content = [
        message.get("content") is None and bool(message.get("tool_calls")) for message in messages
    ]
    if not any(lacks_content):
        return None
    return [
        {**message, "content": ""} if lacks else message
        for message, lacks in zip(messages, lacks_content, strict=True)
    ]


def _convert_arguments(messages: list[Message]) -> list[Message] | None:
    """Convert arguments of tool calls from objects to JSON text and from JSON text to objects.

    Returns None if no call has arguments.
    """
    has_changed = False
    converted_messages: list[Message] = []
    for message in messages:
        calls = message.get("tool_calls")
        if not isinstance(calls, list):
            converted_messages.append(message)
            continue
        converted = [_convert_call(call) for call in calls]
        has_changed = has_changed or any(
            new is not old for new, old in zip(converted, calls, strict=True)
        )
        converted_messages.append({**message, "tool_calls": converted})
    return converted_messages if has_changed else None


def _convert_call(call: Any) -> Any:
    function = call.get("function", call) if isinstance(call, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    try:
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        elif isinstance(arguments, dict):
            arguments = json.dumps(arguments, ensure_ascii=False)
        else:
            return call
    except (ValueError, RecursionError):
        return call
    converted = {**function, "arguments": arguments}  # type: ignore[dict-item]
    return {**call, "function": converted} if "function" in call else converted
