"""Reasoning of earlier turns: insertion if omitted, or removal before rendering.

Many templates show the reasoning of the last turn only. To keep the reasoning of the others:

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
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import accumulate

from sftprep.chat_template.assistant_spans import is_assistant
from sftprep.chat_template.compiler.compilation import RenderedPieces
from sftprep.chat_template.reasoning_tags import has_tags, remove_tagged
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
_CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": "b"}}}
"""A content that occurs in no template."""


def has_reasoning(message: Message) -> bool:
    """Return whether a message of the assistant contains reasoning.

    It may be under a key or in tags.
    """
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
    content = message.get("content")
    if not has_reasoning(message) and not (is_assistant(message) and has_tags(content)):
        return message
    kept = {key: value for key, value in message.items() if key not in REASONING_KEYS}
    if isinstance(content, str):
        kept["content"] = remove_tagged(content)
    return kept


def find_emptied(messages: Sequence[Message], kept: Sequence[Message]) -> int | None:
    """Return the number of the first message, from 1, that was nothing but reasoning, or None.

    Args:
        messages: The messages.
        kept: The messages without reasoning.
    """
    for number, (before, after) in enumerate(zip(messages, kept, strict=True), 1):
        is_filled = bool(after.get("tool_calls") or str(after.get("content") or "").strip())
        if before is not after and not is_filled:
            return number
    return None


def without_omissible(messages: Sequence[Message]) -> list[Message]:
    """Return messages without what templates omit of earlier turns.

    This is the reasoning, and the text alongside calls.
    """
    return [
        {**kept, "content": ""} if kept.get("tool_calls") and kept.get("content") else kept
        for kept in map(without_reasoning, messages)
    ]


def without_empty_blocks(
    spans: tuple[tuple[int, int], ...] | None, text: str
) -> tuple[tuple[int, int], ...]:
    """Return spans without the empty blocks of reasoning in a text.

    Spans of None are the whole text.
    """
    blocks = [match.span() for match in EMPTY_BLOCK.finditer(text)]
    kept: list[tuple[int, int]] = []
    for first, last in ((0, len(text)),) if spans is None else spans:
        start = first
        for begin, end in blocks:
            if start < end and begin < last:
                kept.append((start, max(start, begin)))
                start = min(end, last)
        kept.append((start, last))
    return tuple(span for span in kept if span[0] < span[1])


def is_reasoning_shown(render: Callable[[list[Message]], str], *, in_tags: bool) -> bool:
    """Return whether a template shows the reasoning of the last turn, with or without a call.

    A template that rejects the probes may show it.

    Args:
        render: Renders messages, or raises TemplateError.
        in_tags: Whether the reasoning is in the content, and not under a key.
    """
    answer: Message = {"role": "assistant", "content": "Qq8vitu"}
    if in_tags:
        answer["content"] = f"<think>\n{_WORD}\n</think>\n\nQq8vitu"
    else:
        answer |= dict.fromkeys(REASONING_KEYS, _WORD)
    return _is_word_shown(render, [answer, {**answer, "tool_calls": [_CALL]}])


def is_text_with_call_shown(render: Callable[[list[Message]], str]) -> bool:
    """Return whether a template shows the text alongside a call in the last turn.

    Some templates show only that of the first call. One that rejects the probe may show it.
    """
    earlier: list[Message] = [
        {"role": "assistant", "content": "Qq8vitu", "tool_calls": [_CALL]},
        {"role": "tool", "name": "f", "content": "Qq9wolo"},
        {"role": "assistant", "content": "Qq5rifa"},
        {"role": "user", "content": "Qq6tebo"},
    ]
    turn = {"role": "assistant", "content": _WORD, "tool_calls": [_CALL]}
    return _is_word_shown(render, [turn], earlier)


def _is_word_shown(
    render: Callable[[list[Message]], str], turns: list[Message], earlier: Sequence[Message] = ()
) -> bool:
    """Return whether a turn with the word of the probes is shown, or each one is rejected."""
    texts: list[str] = []
    for turn in turns:
        with suppress(TemplateError):
            texts.append(render([{"role": "user", "content": "Qq7kuza"}, *earlier, turn]))
    return not texts or any(_WORD in text for text in texts)


def find_ends(render: Callable[[list[Message]], Rendered]) -> tuple[str, str]:
    """Find the ends of an earlier turn and of the last one.

    The end is what the template writes after the content.

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
        turns = [_texts_of_turns(render(messages)).get(1) for messages in (probe, probe[:2])]
    except TemplateError:
        return "", ""
    earlier, last = (turn[1].partition(_WORD)[2] if turn else "" for turn in turns)
    return earlier, last


Insertion = tuple[int, str]
"""A position in a text, and the string to insert there."""


def find_insertions(
    rendered: Rendered,
    messages: Sequence[Message],
    render_until: Callable[[int], Rendered],
    ends: tuple[str, str],
) -> tuple[list[Insertion], list[int]]:
    """Find what each earlier turn has only when it is the last one.

    Args:
        rendered: The whole conversation, with its regions.
        messages: Its messages.
        render_until: Returns the rendering of the first n messages.
        ends: See `find_ends`.

    Returns:
        What to insert, in ascending order; and the indices of the messages with reasoning for which
        this is not proven.
    """
    turns = [k for k, message in enumerate(messages[:-1]) if is_assistant(message)]
    if sum(turns) > _MOST_RENDERED:
        return [], [turn for turn in turns if has_reasoning(messages[turn])]
    texts = _texts_of_turns(rendered)
    insertions: list[Insertion] = []
    unproven: list[int] = []
    for turn in turns:
        here, there = texts.get(turn), _texts_of_turns(render_until(turn + 1)).get(turn)
        if here is not None and there is not None:
            found = _find_insertion(here[1], there[1], ends)
            if found is not None:
                if found[1]:
                    insertions.append((here[0] + found[0], found[1]))
                continue
        if has_reasoning(messages[turn]):
            unproven.append(turn)
    return insertions, unproven


def _texts_of_turns(rendered: Rendered) -> dict[int, tuple[int, str] | None]:
    """Return the start and the text of each turn, by message.

    The value is None for a turn in several pieces.
    """
    texts: dict[int, tuple[int, str] | None] = {}
    for first, last, message in rendered.regions:
        texts[message] = None if message in texts else (first, rendered.text[first:last])
    return texts


def _find_insertion(here: str, there: str, ends: tuple[str, str]) -> tuple[int, str] | None:
    """Find the additional text of a turn, apart from its end.

    Args:
        here: The text of the turn.
        there: Its text in a rendering that may have more.
        ends: The ends of the turn in both.

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


def insert_into_text(rendered: Rendered, insertions: Sequence[Insertion]) -> Rendered:
    """Insert strings into a rendering, and move its spans and regions.

    A string belongs to the span or region that starts at its position, or contains it.
    """
    positions = [position for position, _ in insertions]
    sizes = [0, *accumulate(len(text) for _, text in insertions)]

    def move_offset(offset: int) -> int:
        return offset + sizes[bisect_left(positions, offset)]

    parts = [
        rendered.text[begin:end] + text
        for begin, (end, text) in zip([0, *positions], insertions, strict=False)
    ]
    return Rendered(
        "".join([*parts, rendered.text[positions[-1] :]]),
        tuple((move_offset(first), move_offset(last)) for first, last in rendered.spans),
        tuple(
            Region(move_offset(first), move_offset(last), message)
            for first, last, message in rendered.regions
        ),
    )


def insert_into_pieces(
    rendering: RenderedPieces, insertions: Sequence[Insertion], count_anchors: Callable[[str], int]
) -> RenderedPieces:
    """Insert strings into the pieces of a rendering, and move its marks.

    The result is that of `insert_into_text`, in the form that the fast path for masks takes.

    Args:
        rendering: The rendering.
        insertions: The strings, with their positions in characters, in ascending order.
        count_anchors: Returns the number of anchors in a string.
    """
    ends = [*accumulate(map(len, rendering.pieces))]
    pieces: list[str] = []
    # For each boundary between the old pieces, by how many pieces and anchors it moves.
    moves: list[tuple[int, int]] = []
    anchors = start = 0
    for position, text in insertions:
        # The piece that contains the position, or starts there; empty pieces stay before it.
        index = bisect_right(ends, position)
        pieces += rendering.pieces[start:index]
        moves += [(len(pieces) - index, anchors)] * (index + 1 - len(moves))
        rest, start = "", index
        if index < len(ends):
            cut = position - (ends[index] - len(rendering.pieces[index]))
            if cut:
                pieces.append(rendering.pieces[index][:cut])
            rest, start = rendering.pieces[index][cut:], index + 1
        pieces += [text, rest]
        anchors += count_anchors(text)
    pieces += rendering.pieces[start:]
    moves += [(len(pieces) - len(ends), anchors)] * (len(ends) + 1 - len(moves))
    marks, turns = [*rendering.marks], [*rendering.turns]
    for values, step in ((marks, 2), (turns, 4)):
        for at in range(0, len(values), step):
            moved, more = moves[values[at]]
            values[at] += moved
            values[at + 1] += more
    return RenderedPieces(
        "".join(pieces), pieces, rendering.anchors + anchors, marks, turns, rendering.messages
    )
