"""Names of speakers in data sets, and their roles in chat templates."""

from __future__ import annotations

from typing import Any

from sftprep.chat_template.reference.rendering import REASONING_KEYS
from sftprep.core.types import Message

TOOL_CALL = "tool_call"
"""The role of a turn whose content is the JSON of tool calls; it becomes an assistant message."""

PASSED_ROLES = frozenset({"function", "ipython", "environment"})
"""Roles of tool results that only some templates know; the others receive `tool`."""

SYSTEM_ROLES = ("system", "developer")
"""Roles of the first message of a conversation."""

SHOWN_KEYS = frozenset(
    {
        *("name", "tool_calls", "tool_call_id", "function_call", "tool_plan"),
        *("tools", "documents", "citations", "prefix"),
        *REASONING_KEYS,
    }
)
"""Keys of a message, besides its role and content, that some template shows."""

_NAMES = {
    "system": "system",
    "developer": "developer",
    "user": "user human prompter",
    "assistant": "assistant gpt chatgpt bing bard model bot ai chatbot",
    "tool": "tool observation function_response tool_response tool_result tool_output",
    "function": "function",
    "ipython": "ipython",
    "environment": "environment",
    TOOL_CALL: "tool_call tool_calls function_call",
}

ROLES = {name: role for role, names in _NAMES.items() for name in names.split()}
"""The role of each known name, in lower case and with underscores."""

PLAIN_ROLES = frozenset({*SYSTEM_ROLES, "user", "assistant", "tool"})
"""Roles that every template receives as they are."""


def to_role(name: Any) -> str | None:
    """Return the role of a speaker, or None for an unknown name.

    Example:
        to_role(" Human") -> "user"
        to_role("tool-response") -> "tool"
    """
    if not isinstance(name, str):
        return None
    return ROLES.get(name) or ROLES.get(name.strip().lower().replace("-", "_").replace(" ", "_"))


def is_answered(messages: list[Message]) -> bool:
    """Return whether the last message is one of the assistant."""
    return bool(messages) and messages[-1]["role"] == "assistant"
