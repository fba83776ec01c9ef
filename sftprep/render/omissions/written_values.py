"""The values of a record that a template is known to have written."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sftprep.core.types import function_of

_MOST_WORK = 1 << 28
"""The largest number of characters that are searched for JSON out of order; the other values are
then not known to be written."""


class WrittenValues:
    """The objects written by a rendering.

    Args:
        text: The rendered text.
        pieces: The strings that it consists of.
        written_as_json: Values that the template converted to JSON, with the results.
    """

    def __init__(
        self,
        text: str = "",
        pieces: Iterable[str] = (),
        written_as_json: Iterable[tuple[Any, str]] = (),
    ) -> None:
        # A string that is written for one leaf is not written for another one, but everything in an
        # object or a list is written with it.
        self._strings = set(map(id, pieces))
        self._containers: set[int] = set()
        end = 0  # of the JSON found last: most templates write it in the order of its conversion
        searches_left = 1 + _MOST_WORK // (1 + len(text))
        for value, json_text in written_as_json:
            is_written = id(json_text) in self._strings
            if not is_written and searches_left:
                start = text.find(json_text, end)
                if start < 0:
                    # Only these searches read the whole text.
                    searches_left -= 1
                    start = text.find(json_text)
                if start >= 0:
                    is_written, end = True, start + len(json_text)
            if is_written:
                (self._strings if isinstance(value, str) else self._containers).add(id(value))

    def has_part_of(self, tool: Any) -> bool:
        """Return whether a tool was written, or its function, or the parameters of that."""
        function = function_of(tool)
        parts = function.values() if isinstance(function, dict) else ()
        return not self._containers.isdisjoint(map(id, (tool, function, *parts)))

    def take(self, value: Any) -> bool:
        """Return whether a value was written; for a string, only the first time."""
        key = id(value)
        if key in self._containers:
            return isinstance(value, dict | list)
        # Python has only one object for each single character, so those are never certain.
        if key not in self._strings or not isinstance(value, str) or len(value) < 2:
            return False
        self._strings.remove(key)
        return True
