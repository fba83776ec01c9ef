"""What is reasoning in a content with tags such as `<think>`.

One rule serves the count of omissions and `reasoning="drop"`:

1. An opening tag starts a block if it is at the start of the content or of a line, or follows
   another block. The block ends at the closing tag that belongs to it, also if blocks are nested.
2. A closing tag without an opening one ends a block that starts with the content, if the tag is on
   a line of its own: the generation prompt has the opening tag.
3. All other tags are text about tags, as are tags in quotes and in fenced code.

Where the end of a block is ambiguous, the shorter block is chosen, so that no answer is taken for
reasoning.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

_TAG = re.compile(r"<(/?)think(?:ing)?>")
_WHITESPACE = re.compile(r"\s*")
_QUOTES = ("`", '"', "'")
_FENCE = "```"


class Block(NamedTuple):
    """Reasoning in a content, with offsets in characters."""

    start: int  # of the opening tag; 0 without one
    inside: int  # the end of the opening tag
    close: int  # the start of the closing tag
    end: int  # the end of the closing tag


class TaggedContent(NamedTuple):
    """The parts of a content between which templates distinguish.

    Attributes:
        before: The text before the opening tag.
        has_opening: Whether there is an opening tag.
        inside: The text before the closing tag.
        after: The text after it.
        is_reasoning: Whether `inside` is reasoning, as opposed to text that mentions tags.
    """

    before: str
    has_opening: bool
    inside: str
    after: str
    is_reasoning: bool


def has_tags(text: Any) -> bool:
    """Return whether a text contains a tag of reasoning."""
    return isinstance(text, str) and "think" in text and _TAG.search(text) is not None


def find_blocks(content: str) -> list[Block]:
    """Return the blocks of reasoning in a content, in order.

    Example:
        "<think>a <think>b</think></think> Four."  ->  [Block(0, 7, 25, 33)]
        "Write </think> to end."                   ->  []
    """
    tags = [tag for tag in _TAG.finditer(content) if not _is_quoted(tag)]
    blocks: list[Block] = []
    position = fence_position = 0
    in_fence = False
    for index, tag in enumerate(tags):
        if tag.start() < position:
            continue  # inside the last block
        fence_position = max(position, fence_position)
        in_fence ^= content.count(_FENCE, fence_position, tag.start()) % 2 == 1
        fence_position = tag.start()
        if in_fence:
            continue
        if tag[1]:
            if blocks or not _is_line(tag):
                continue
            blocks.append(Block(0, 0, *tag.span()))
        elif _begins_line(tag) or (blocks and _skip_whitespace(content, position) == tag.start()):
            closing = _find_closing(tags, index)
            if closing is None:
                # At the start, the reasoning was cut. Elsewhere, it may be text about tags.
                if not content[: tag.start()].strip():
                    blocks.append(Block(0, tag.end(), len(content), len(content)))
                break
            blocks.append(Block(*tag.span(), *closing.span()))
        else:
            continue
        position, in_fence = blocks[-1].end, False
    return blocks


def split_tagged(content: str) -> TaggedContent:
    """Return the parts of a content with `</think>`, at its first block.

    Without a block, the parts are those around the first closing tag, at which templates split.
    """
    for block in find_blocks(content):
        if content.startswith("</think>", block.close):
            return TaggedContent(
                content[: block.start],
                block.inside > block.start,
                content[block.inside : block.close],
                content[block.end :],
                True,
            )
    head, _, after = content.partition("</think>")
    before, tag, inside = head.partition("<think>")
    if not tag:
        before, inside = "", head
    return TaggedContent(before, bool(tag), inside, after, False)


def remove_tagged(text: str) -> str:
    """Return an answer without its blocks of reasoning and the whitespace after them."""
    if not has_tags(text):
        return text
    kept, position = [], 0
    for block in find_blocks(text):
        kept.append(text[position : block.start])
        position = _skip_whitespace(text, block.end)
    return "".join([*kept, text[position:]])


def remove_from_completion(prompt: str, completion: str) -> tuple[str, str]:
    """Remove reasoning from a completion, and its opening tag from the end of the prompt."""
    *_, last = (None, *_TAG.finditer(prompt))
    if last is not None and not last[1] and not prompt[last.end() :].strip():
        opened = last[0] + completion
        kept = remove_tagged(opened)
        if _TAG.search(completion) and kept != opened:
            return prompt[: last.start()], kept
    return prompt, remove_tagged(completion)


def _find_closing(tags: list[re.Match[str]], first: int) -> re.Match[str] | None:
    """Return the closing tag that belongs to an opening one, or None.

    A block may mention tags. So the tags that are on lines of their own are also matched alone, and
    the first end is chosen. If too few tags close the block, the last one ends it.
    """
    depth, depth_of_lines, closing = 0, 0, None
    for number in range(first, len(tags)):
        tag = tags[number]
        step = -1 if tag[1] else 1
        depth += step
        if _is_line(tag):
            depth_of_lines += step
        if tag[1]:
            closing = tag
            if depth == 0 or (depth_of_lines == 0 and _is_line(tag) and _is_line(tags[first])):
                return tag
    if closing is None:  # a quoted tag is better than no end, which takes all text
        quoted = _TAG.finditer(tags[first].string, tags[first].end())
        closing = next((tag for tag in quoted if tag[1]), None)
    return closing


def _is_quoted(tag: re.Match[str]) -> bool:
    text = tag.string
    before, after = text[max(tag.start() - 1, 0) : tag.start()], text[tag.end() : tag.end() + 1]
    return before == after and before in _QUOTES


def _begins_line(tag: re.Match[str]) -> bool:
    text, start = tag.string, tag.start()
    while start and text[start - 1] in " \t":
        start -= 1
    return start == 0 or text[start - 1] in "\r\n"


def _is_line(tag: re.Match[str]) -> bool:
    """Return whether a tag is on a line of its own."""
    end = _skip_whitespace(tag.string, tag.end())
    is_end = end == len(tag.string) or "\n" in tag.string[tag.end() : end]
    return is_end and _begins_line(tag)


def _skip_whitespace(text: str, start: int) -> int:
    return _WHITESPACE.match(text, start).end()  # type: ignore[union-attr]  # it always matches
