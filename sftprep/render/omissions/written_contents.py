"""A check for contents that a compiled template writes, which needs no search.

The output of a compiled template is a list of pieces: its own text, roles, and contents.

1. A content that is written unchanged is the same object in this list, which proves that it is
   written.
2. Contents of one character are the same object everywhere, and most templates strip contents,
   which makes new objects of them. Such a content is proven by its place: the pieces before it are
   those that separate the contents of these two roles in other conversations, and it is the next
   piece. The pieces after it must be known too: a template that drops a content may continue with
   a piece that equals it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sftprep.core.types import Message

_MOST_GAPS = 8
"""The largest number of gaps that are kept for a pair of roles."""
_LONGEST_GAP = 64
_MOST_PROBED = 8
"""The largest number of messages in a probe."""
_MOST_PROBES = 64
_NO_ROLE = ""
_Roles = tuple[str, ...]


class WrittenContents:
    """The check for the conversations of one template.

    It runs for every record of a build.

    Args:
        render: Returns the pieces of a conversation; none if the template is not compiled.
    """

    def __init__(self, render: Callable[[list[Message]], Sequence[str]]) -> None:
        self._render = render
        # The pieces between two contents, before the first one, and after the last one, by the
        # roles of the messages.
        self._gaps: dict[tuple[str, str], list[list[str]]] = {}
        self._probed: set[_Roles] = set()

    def has_all(self, messages: Sequence[Message], pieces: Sequence[str]) -> bool:
        """Return whether the pieces include the contents of all messages, in their order.

        Args:
            messages: The messages, none of which has more than a role and a content.
            pieces: The pieces of their rendering.
        """
        gaps_of, num_pieces = self._gaps, len(pieces)
        start, previous_role = 0, _NO_ROLE
        for message in messages:
            role, content = message["role"], message.get("content")
            for gap in gaps_of.get((previous_role, role), ()):
                position = start + len(gap)
                if position < num_pieces and pieces[position] is content and len(content) > 1:
                    break
            else:
                return self._has_all_in_place(messages, pieces)
            start, previous_role = position + 1, role
        return True

    def _has_all_in_place(self, messages: Sequence[Message], pieces: Sequence[str]) -> bool:
        """Return the result of `has_all`, also for contents that are proven by their places."""
        if any(
            len(message) != 2
            or type(message.get("content")) is not str
            or not message["content"].strip()
            for message in messages
        ):
            return False
        if self._find_places(messages, pieces):
            return True
        # The conversation may have pairs of roles that are new, or all of whose contents are short.
        roles = tuple(message["role"] for message in messages)
        if len(roles) > _MOST_PROBED:
            roles = roles[: _MOST_PROBED // 2] + roles[-_MOST_PROBED // 2 :]
        if roles in self._probed or len(self._probed) == _MOST_PROBES:
            return False
        self._probed.add(roles)
        probe: list[Message] = [
            {"role": role, "content": f"content {number}"} for number, role in enumerate(roles)
        ]
        return self._find_places(probe, self._render(probe)) and self._find_places(messages, pieces)

    def _find_places(self, messages: Sequence[Message], pieces: Sequence[str]) -> bool:
        """Return whether all contents are written; gaps between proven contents are kept."""
        start, previous_role = 0, _NO_ROLE
        is_certain, has_uncertain = True, False  # the content before; any content so far
        for message in messages:
            role, content = message["role"], message["content"]
            gaps = self._gaps.setdefault((previous_role, role), [])
            was_certain, position = is_certain, _find_object(content, pieces, start)
            is_certain = position >= 0
            if is_certain:
                is_known = self._keep(gaps, pieces[start:position], was_certain)
                if has_uncertain and not is_known:
                    return False
            else:
                has_uncertain = True
                position = _find_after(gaps, content.strip(), pieces, start)
                if position < 0:
                    return False
            start, previous_role = position + 1, role
        tails = self._gaps.setdefault((previous_role, _NO_ROLE), [])
        return self._keep(tails, pieces[start:], is_certain) or not has_uncertain

    def _keep(self, gaps: list[list[str]], pieces: Sequence[str], is_certain: bool) -> bool:
        """Add pieces to the known gaps if they are certain; return whether they were known."""
        gap = [*pieces]
        if gap in gaps:
            return True
        if is_certain and len(gap) <= _LONGEST_GAP and len(gaps) < _MOST_GAPS:
            gaps.append(gap)
        return False


def _find_object(content: str, pieces: Sequence[str], start: int) -> int:
    """Return the position of the same object from a start, or -1."""
    if len(content) < 2:
        return -1
    positions = range(start, len(pieces))
    return next((position for position in positions if pieces[position] is content), -1)


def _find_after(gaps: list[list[str]], stripped: str, pieces: Sequence[str], start: int) -> int:
    """Return the position of a stripped content after one of the known gaps, or -1."""
    for gap in gaps:
        position = start + len(gap)
        if (
            position < len(pieces)
            and pieces[position].strip() == stripped
            and pieces[start:position] == gap
        ):
            return position
    return -1
