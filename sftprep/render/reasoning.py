"""Reasoning of earlier turns: inserted where a template omits it, or removed before rendering.

Many templates show the reasoning of the last turn only. To keep the reasoning of the others
(`insert_reasoning`):

1. Render the conversation, and for each earlier turn of the assistant, the conversation up to it.
2. Compare the text of the turn in both, without the ends of the turn, which templates may write
   differently for the last one. What the second has in addition, in one place, is inserted into the
   first: the reasoning with its tags and whitespace, or an empty block.
3. Nothing else is taken from the second rendering. Where the turn differs in more, nothing is
   inserted, and the turn is reported.

Cost: one rendering for each turn of the assistant, so that the time is quadratic in the number of
turns; conversations of more than `_MOST_RENDERED` messages in total are reported instead.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate

from sftprep.chat_template.assistant_spans import is_assistant
from sftprep.chat_template.reference.rendering import REASONING_KEYS
from sftprep.chat_template.reference.turn_tracking import Region
from sftprep.chat_template.template import Rendered
from sftprep.core.types import Message
from sftprep.errors import TemplateError

EMPTY_BLOCK = re.compile(r"<think>\s*</think>\s*")
"""A block of reasoning without reasoning, as some templates write it."""

_MOST_RENDERED = 100_000
"""The largest sum of the messages of all renderings of one conversation."""
_WORD = "Zz3mabe"
"""A content that occurs in no template."""


def has_reasoning(message: Message) -> bool:
    """Return whether a message of the assistant contains reasoning, under a key or in tags."""
    content = message.get("content")
    return is_assistant(message) and (
        any(message.get(key) for key in REASONING_KEYS)
        or (isinstance(content, str) and "</think>" in content)
    )


def without_reasoning(message: Message) -> Message:
    """Return a message without its reasoning.

    Example:
        {"role": "assistant", "content": "<think>\\nTwo and two.\\n</think>\\n\\nFour."}
        ->  {"role": "assistant", "content": "Four."}
    """
    if not has_reasoning(message):
        return message
    kept = {key: value for key, value in message.items() if key not in REASONING_KEYS}
    content = message.get("content")
    if isinstance(content, str) and "</think>" in content:
        kept["content"] = content.rpartition("</think>")[2].lstrip()
    return kept


def find_ends(render: Callable[[list[Message]], Rendered]) -> tuple[str, str]:
    """Return what a template writes after the content of an earlier turn, and of the last one.

    Args:
        render: Returns the rendering of messages, with its regions.

    Returns:
        Both ends; empty if the template rejects the probe or does not write it as it is.
    """
    probe = [
        {"role": "user", "content": "Qq7kuza"},
        {"role": "assistant", "content": _WORD},
        {"role": "user", "content": "Qq8vitu"},
    ]
    try:
        turns = (_text_of_turn(render(probe), 1), _text_of_turn(render(probe[:2]), 1))
    except TemplateError:
        return "", ""
    earlier, last = (turn[1].partition(_WORD)[2] if turn else "" for turn in turns)
    return earlier, last


def insert_reasoning(
    rendered: Rendered,
    messages: Sequence[Message],
    render_until: Callable[[int], Rendered],
    ends: tuple[str, str],
) -> tuple[Rendered, list[int]]:
    """Insert into a rendering what each earlier turn has when it is the last one.

    Args:
        rendered: The whole conversation, with its regions.
        messages: Its messages.
        render_until: Returns the rendering of the first n messages.
        ends: See `find_ends`.

    Returns:
        The rendering with the insertions; and the indices of the messages with reasoning for which
        it is not proven what to insert.
    """
    turns = [k for k, message in enumerate(messages[:-1]) if is_assistant(message)]
    if sum(turns) > _MOST_RENDERED:
        return rendered, [turn for turn in turns if has_reasoning(messages[turn])]
    insertions: list[tuple[int, str]] = []
    unproven: list[int] = []
    for turn in turns:
        here = _text_of_turn(rendered, turn)
        there = _text_of_turn(render_until(turn + 1), turn)
        if here is not None and there is not None:
            found = _find_insertion(here[1], there[1], ends)
            if found is not None:
                insertions += [(here[0] + found[0], found[1])] * bool(found[1])
                continue
        if has_reasoning(messages[turn]):
            unproven.append(turn)
    return (_insert(rendered, insertions) if insertions else rendered), unproven


def _text_of_turn(rendered: Rendered, turn: int) -> tuple[int, str] | None:
    """Return the start and the text of a turn; None if it is not in one piece."""
    parts = [region for region in rendered.regions if region.message == turn]
    if len(parts) != 1:
        return None
    return parts[0].first, rendered.text[parts[0].first : parts[0].last]


def _find_insertion(here: str, there: str, ends: tuple[str, str]) -> tuple[int, str] | None:
    """Return what the text `there` of a turn has in addition to the text `here`, but for its end.

    Returns:
        The position in `here`, and the string to insert there, which may be empty; None if the
        texts differ in more than that.

    Example:
        here = "<a>Four.<end>", there = "<a><think>2+2</think>Four.<last>", ends = "<end>", "<last>"
        ->  (3, "<think>2+2</think>")
    """
    if here.endswith(ends[0]) and there.endswith(ends[1]):
        here, there = here.removesuffix(ends[0]), there.removesuffix(ends[1])
    start = _common_prefix(here, there)
    if not there.endswith(here[start:]):
        return None
    return start, there[start : start + len(there) - len(here)]


def _common_prefix(first: str, second: str) -> int:
    """Return the length of the longest common prefix, by a binary search."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _insert(rendered: Rendered, insertions: list[tuple[int, str]]) -> Rendered:
    """Insert strings into a rendering, and move its spans and regions.

    Args:
        rendered: The rendering.
        insertions: The strings with their positions, in ascending order. A string belongs to the
            span or region that starts at its position, or contains it.
    """
    positions = [position for position, _ in insertions]
    sizes = [0, *accumulate(len(text) for _, text in insertions)]

    def moved(offset: int) -> int:
        return offset + sizes[bisect_left(positions, offset)]

    parts = [
        rendered.text[begin:end] + text
        for begin, (end, text) in zip([0, *positions], insertions, strict=False)
    ]
    return Rendered(
        "".join([*parts, rendered.text[positions[-1] :]]),
        tuple((moved(first), moved(last)) for first, last in rendered.spans),
        tuple(
            Region(moved(first), moved(last), message) for first, last, message in rendered.regions
        ),
    )
