"""A copy of a message with sentinels under the keys without a known meaning."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sftprep.core.types import Message, function_of
from sftprep.records.roles import SHOWN_KEYS
from sftprep.records.switches import SWITCH_KEYS

_KNOWN_KEYS = SHOWN_KEYS | SWITCH_KEYS | {"role", "content", "images", "id"}
_KEYS_OF_PARTS = frozenset({"type", "text"})
_KEYS_OF_CALLS = frozenset({"id", "type", "index", "function", "name", "arguments"})


class UnreadCopy:
    """A copy of messages with a sentinel for each text that is not read.

    Args:
        texts: The texts, stripped.

    Attributes:
        sentinels: The sentinels in the copy.
        remaining: The texts that the copy does not contain.

    Example:
        {"role": "tool", "content": "", "result": 42}, texts = ["42"]
        ->  {"role": "tool", "content": "", "result": "zqu00000000uqz"}
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = [*texts]
        self.sentinels: list[str] = []
        self.remaining = set(self._texts)

    def copy_message(self, message: Message) -> Message:
        """Return the copy of a message."""
        copied = self._replace_unknown(message, _KNOWN_KEYS)
        content = message.get("content")
        if isinstance(content, list):
            copied["content"] = [
                self._replace_unknown(part, _KEYS_OF_PARTS) if isinstance(part, dict) else part
                for part in content
            ]
        calls = message.get("tool_calls")
        if isinstance(calls, list):
            copied["tool_calls"] = [
                self._copy_call(call) if isinstance(call, dict) else call for call in calls
            ]
        return copied

    def _copy_call(self, call: dict[str, Any]) -> dict[str, Any]:
        copied = self._replace_unknown(call, _KEYS_OF_CALLS)
        function = function_of(call)
        if isinstance(function, dict) and function is not call:
            copied["function"] = self._replace_unknown(function, _KEYS_OF_CALLS)
        return copied

    def _replace_unknown(self, values: dict[str, Any], known: frozenset[str]) -> dict[str, Any]:
        return {
            key: value if key in known else self._replace(value) for key, value in values.items()
        }

    def _replace(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._replace(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._replace(item) for item in value]
        if not isinstance(value, str | int | float):
            return value
        # A text may be a part of JSON text.
        written = str(value)
        found = [text for text in self._texts if text in written]
        if not found:
            return value
        self.remaining.difference_update(found)
        # Lowercase letters and digits only: no template changes or splits it.
        self.sentinels.append(f"zqu{len(self.sentinels):08d}uqz")
        return self.sentinels[-1]
