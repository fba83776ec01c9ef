"""The forms of messages in a template, found by rendering probes.

Templates of vision models iterate over the parts of a content, and write nothing for a string.
Other templates know only some of the roles for the results of tools, or show the parameters of a
tool only if they are in a JSON schema.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sftprep.core.types import Message
from sftprep.errors import TemplateError

Render = Callable[[list[Message]], str]
"""Renders messages, or raises TemplateError."""

_PROBE = "sftprep probe 7391"
_PARAMETER = "probe7391"
_MARK = "zq7391"
"""A value of parts of probes that a template writes only if it writes whole parts."""
_CONTENT_ROLES = ("user", "system", "assistant")


def find_part_roles(render: Render) -> frozenset[str]:
    """Return the roles with contents shown by a template only as a list of parts.

    A template that writes the parts themselves, as one that cuts every content does, expects
    strings.

    Args:
        render: The template.
    """
    found: set[str] = set()
    for role in _CONTENT_ROLES:
        request = _turn("user", "a", found)
        before = [request] if role == "assistant" else []
        after = [request] if role == "system" else []
        if not _shows(render, [*before, _turn(role, _PROBE, ()), *after]) and _shows(
            render, [*before, _turn(role, _PROBE, (role,)), *after]
        ):
            found.add(role)
    # Results of tools and instructions of developers are written like texts of the user, if at all.
    return frozenset(found | {"tool", "developer"} if "user" in found else found)


def find_shown_roles(render: Render, roles: frozenset[str]) -> frozenset[str]:
    """Select the roles shown by a template after a tool call."""
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    before = [{"role": "user", "content": "a"}]
    return frozenset(
        role
        for role in roles
        if any(
            _shows(render, [*before, answer, {"role": role, "name": "f", "content": _PROBE}])
            for answer in (calling, {"role": "assistant", "content": "b"})
        )
    )


def needs_json_schemas(render: Callable[[list[Message], list[Any]], str]) -> bool:
    """Return whether a template shows parameters in a JSON schema, and not those in a table.

    Args:
        render: Renders messages and tools, or raises TemplateError.
    """
    table = {_PARAMETER: {"type": "string", "description": _PROBE}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]

    def shows(parameters: dict[str, Any]) -> bool:
        function = {"name": "f", "description": "c", "parameters": parameters}
        try:
            text = render(messages, [{"type": "function", "function": function}])
        except TemplateError:
            return False
        return _PARAMETER in text and _PROBE in text

    schema = {"type": "object", "properties": table, "required": [_PARAMETER]}
    return shows(schema) and not shows(table)


def to_parts(messages: list[Message], roles: frozenset[str]) -> list[Message]:
    """Return messages with the strings of some roles as lists of one text part."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if type(message.get("content")) is str and message.get("role") in roles
        else message
        for message in messages
    ]


def _turn(role: str, content: str, part_roles: set[str] | tuple[str, ...]) -> Message:
    if role not in part_roles:
        return {"role": role, "content": content}
    return {"role": role, "content": [{"type": "text", "text": content, "mark": _MARK}]}


def _shows(render: Render, messages: list[Message]) -> bool:
    try:
        text = render(messages)
    except TemplateError:
        return False
    return _PROBE in text and _MARK not in text
