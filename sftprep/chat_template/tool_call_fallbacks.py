"""Other ways to write the tool calls of a conversation, for templates that refuse the way in which
a record has them."""

from __future__ import annotations

import json
from typing import Any

from sftprep.core.types import Message


def other_ways(messages: list[Message]) -> list[list[Message]]:
    """The messages as templates may want them that refuse them as they are: arguments of tool calls
    in the other form, calls beside empty content where there is none, or both."""
    arguments, contents = _other_arguments(messages), _empty_contents(messages)
    both = _empty_contents(arguments) if arguments is not None else None
    return [way for way in (arguments, contents, both) if way is not None]


def _empty_contents(messages: list[Message]) -> list[Message] | None:
    """The messages with "" for the content of tool calls that have none, as OpenAI writes them;
    None where all have one."""
    without = [
        message.get("content") is None and bool(message.get("tool_calls")) for message in messages
    ]
    if not any(without):
        return None
    return [
        {**message, "content": ""} if empty else message
        for message, empty in zip(messages, without, strict=True)
    ]


def _other_arguments(messages: list[Message]) -> list[Message] | None:
    """The messages with the arguments of tool calls as text where they were objects, and as objects
    where they were text.

    None where no call has arguments. Templates want the one or the other, and refuse what they do
    not want.
    """
    changed = False
    made: list[Message] = []
    for message in messages:
        calls = message.get("tool_calls")
        if not isinstance(calls, list):
            made.append(message)
            continue
        turned = [_turned(call) for call in calls]
        changed = changed or any(new is not old for new, old in zip(turned, calls, strict=True))
        made.append({**message, "tool_calls": turned})
    return made if changed else None


def _turned(call: Any) -> Any:
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
    turned = {**function, "arguments": arguments}  # type: ignore[dict-item]
    return {**call, "function": turned} if "function" in call else turned
