"""The contents of a conversation that a compiled template writes unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_, itemgetter
from typing import Any

from sftprep.core.types import Message

_SHAPES_KEPT = 4096
_MOST_MESSAGES_KEPT = 256
"""The limits on the positions that are kept: the number of shapes, and of messages in one."""


class UnchangedContents:
    """A search for the contents that a template writes unchanged.

    Such a content is the same object in the list of pieces. Conversations with equal numbers of
    messages and pieces usually have them at the same positions, so these are tried first: this runs
    for every record.
    """

    def __init__(self) -> None:
        # By the numbers of messages and pieces: returns the pieces that were contents.
        self._getters: dict[tuple[int, int], itemgetter[Any]] = {}

    def has_all(self, messages: Sequence[Message], pieces: Sequence[str]) -> bool:
        """Return whether the pieces include the contents of all messages, in their order.

        Args:
            messages: The messages, none of which has more than a role and a content.
            pieces: The pieces of their rendering.
        """
        shape = len(messages), len(pieces)
        getter = self._getters.get(shape)
        if getter is not None:
            contents: list[Any] = [message.get("content") for message in messages]
            # Single characters and the empty string are the same object everywhere.
            if all(map(is_, contents, getter(pieces))) and min(map(len, contents)) > 1:
                return True
        positions = _find_positions(messages, pieces)
        if positions is None:
            return False
        if 1 < len(positions) <= _MOST_MESSAGES_KEPT and len(self._getters) < _SHAPES_KEPT:
            self._getters[shape] = itemgetter(*positions)
        return True


def _find_positions(messages: Sequence[Message], pieces: Sequence[str]) -> list[int] | None:
    """Return the positions of the contents in the pieces, or None if one is missing."""
    written = enumerate(pieces)  # each search resumes after the piece that the last one found
    positions: list[int] = []
    for message in messages:
        content = message.get("content")
        if len(message) != 2 or type(content) is not str or len(content) < 2:
            return None
        position = next((number for number, piece in written if piece is content), None)
        if position is None:
            return None
        positions.append(position)
    return positions
