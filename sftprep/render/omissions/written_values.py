"""The values of a record that a template is known to have written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sftprep.core.types import function_of

_MOST_WORK = 1 << 28
"""The largest product of values and characters that are searched; otherwise, values that are parts
of pieces are not known to be written."""


class WrittenValues:
    """The objects written by a rendering.

    Args:
        text: The rendered text.
        pieces: The strings that it consists of.
        written_as_json: Values that the template converted to JSON, with the results.
        others: A text with everything from which the text may have the same JSON by chance.
    """

    def __init__(
        self,
        text: str = "",
        pieces: Iterable[str] = (),
        written_as_json: Sequence[tuple[Any, str]] = (),
        others: str = "",
    ) -> None:
        # A string that is written for one leaf is not written for another one, but everything in an
        # object or a list is written with it.
        self._strings = set(map(id, pieces))
        self._containers: set[int] = set()
        end = 0  # of the JSON found last: most templates write it in the order of its conversion
        is_searched = len(written_as_json) * (len(text) + len(others)) <= _MOST_WORK
        for value, json_text in written_as_json:
            is_written = id(json_text) in self._strings
            if not is_written and is_searched and isinstance(value, dict | list):
                # It may be a part of a piece.
                start = text.find(json_text, end)
                is_written = start >= 0 and json_text not in others
                end = start + len(json_text) if is_written else end
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
