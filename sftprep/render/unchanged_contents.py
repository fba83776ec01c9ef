"""The contents of a conversation that a compiled template writes unchanged."""

from __future__ import annotations

from collections.abc import Sequence

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
        # By the numbers of messages and pieces: the number of each message, with the position of
        # its content in the pieces.
        self._positions: dict[tuple[int, int], list[tuple[int, int]]] = {}

    def has_all(self, messages: Sequence[Message], pieces: Sequence[str]) -> bool:
        """Return whether the pieces include the contents of all messages, in their order.

        Args:
            messages: The messages, none of which has more than a role and a content.
            pieces: The pieces of their rendering.
        """
        shape = len(messages), len(pieces)
        known_positions = self._positions.get(shape)
        if known_positions is not None:
            for number, position in known_positions:
                content = messages[number].get("content")
                # Single characters and the empty string are the same object everywhere.
                if content is not pieces[position] or len(content) < 2:
                    break
            else:
                return True
        positions = _find_positions(messages, pieces)
        if positions is None:
            return False
        if len(positions) <= _MOST_MESSAGES_KEPT and len(self._positions) < _SHAPES_KEPT:
            self._positions[shape] = [*enumerate(positions)]
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
