"""Decisions about single leaves of a conversation, for templates that refuse sentinels.

A template may refuse values that it does not know, such as long names or large numbers. So the
conversation itself is rendered with one leaf changed, and everything else as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sftprep.core.types import Message
from sftprep.render.omissions.sentinels import SentinelCopy
from sftprep.render.omissions.tool_leaves import copy_tool

_MOST_RENDERED = 64
"""The most renderings of one conversation."""


class LeafProbe:
    """The decisions about the leaves of one conversation.

    Args:
        render: Renders messages and tools, or raises.
        text: The rendered conversation.
    """

    def __init__(
        self,
        render: Callable[[list[Message], list[Any] | None], str],
        messages: list[Message],
        tools: list[Any] | None,
        text: str,
    ) -> None:
        self._render, self._messages, self._tools, self._text = render, messages, tools, text
        self._renderings_left = _MOST_RENDERED

    def shows(self, number: int, value: str | int | float) -> bool:
        """Return whether the template writes a leaf; True if it refuses every other value.

        Args:
            number: The number of the leaf.
            value: Its value.
        """
        for other in _alternatives(value):
            if self._renderings_left == 0:
                break
            self._renderings_left -= 1
            copy = _ChangedCopy(number=number, value=other)
            try:
                messages = [copy.copy_message(message) for message in self._messages]
                changed = self._render(messages, copy.copy_tools(self._tools or []) or None)
            except Exception:  # a template may refuse a value for any reason
                continue
            return changed.count(str(other)) > self._text.count(str(other))
        return True


def _alternatives(value: str | int | float) -> Iterator[str | int | float]:
    """Yield other values for a leaf, those that are certain first."""
    if isinstance(value, str):
        yield "zqx00000000xqz"
        yield "q" * len(value)  # a template may limit the length
    else:
        yield from (918_0000_0000, value + 1, value - 1)


@dataclass(slots=True, kw_only=True)
class _ChangedCopy(SentinelCopy):
    """A copy of a record with another value for one leaf.

    Args:
        number: The number of the leaf.
        value: Its other value.
    """

    number: int
    value: str | int | float

    def copy_tools(self, tools: list[Any]) -> list[Any]:
        """Return the copy of the tools, which come after all messages."""
        return [copy_tool(tool, self.replace) for tool in tools]

    def replace(self, value: Any) -> Any:
        """Return the value of the next leaf."""
        self.sentinels.append("")
        return self.value if len(self.sentinels) == self.number + 1 else value
