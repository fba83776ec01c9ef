"""Attribution of rendered text to messages, by reports from a template's loops.

1. `track_turns` inserts a statement at the start of each loop of the syntax tree, and one after the
   loop. Each of them reports the position in the output and the item that the loop is at.
2. While a loop is at a message, everything that is written belongs to this message. Loops over
   other things (tools, parts of a content) change nothing.
3. `regions_of` turns the reported marks into regions of the text.

Jinja and the compiler run the same tree, so both report the same marks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes

Mark = tuple[int, int, Any]
"""Position in the output, depth of the loop (from 0), and the loop's item; None after the loop."""


class Region(NamedTuple):
    """Characters [first, last) of a rendered conversation, written by one message."""

    first: int
    last: int
    message: int  # index of the message; -1: text of the template that belongs to no message


def track_turns(tree: nodes.Template, environment: jinja2.Environment, identifier: str) -> None:
    """Make the loops of a template report their items.

    Args:
        tree: The syntax tree, which is changed.
        environment: The environment of the tree.
        identifier: The Jinja extension whose method `_turn(depth, item)` the loops call.
    """
    tree.body = _with_reports(tree.body, 0, identifier)
    tree.set_environment(environment)


def turn_of(node: nodes.ExprStmt) -> tuple[int, nodes.Expr | None] | None:
    """Return the depth and the item of a statement inserted by `track_turns`.

    The item is None after a loop. The result is None for any other statement.
    """
    call = node.node
    if not (
        isinstance(call, nodes.Call)
        and isinstance(call.node, nodes.ExtensionAttribute)
        and call.node.name == "_turn"
    ):
        return None
    depth, item = call.args
    assert isinstance(depth, nodes.Const)
    return depth.value, None if isinstance(item, nodes.Const) else item


def regions_of(marks: Sequence[Mark], messages: Sequence[Any], end: int) -> tuple[Region, ...]:
    """Return the regions of a text of `end` characters, in order.

    No region is empty, and adjacent regions belong to different messages. Some templates build new
    messages, partly by merging adjacent ones with the same role. These are matched by role and
    content, and a merged message belongs to the first of its parts.

    Example:
        marks = [(2, 0, messages[0]), (5, 0, messages[1]), (9, 0, None)], end = 10
        ->  Region(0, 2, -1), Region(2, 5, 0), Region(5, 9, 1), Region(9, 10, -1)
    """
    numbers = {id(message): number for number, message in enumerate(messages)}
    active: list[int] = []  # for each open loop, the message that it is at; -1: another item
    regions: list[Region] = []
    start, writer = 0, -1  # start and message of the current region
    next_unmatched = 0  # first message that no rebuilt message has been matched with
    following = [*marks[1:], (end, -1, None)]
    for (position, depth, item), (next_position, next_depth, _) in zip(
        marks, following, strict=False
    ):
        if next_position == position and next_depth == depth and item is not None:
            # Nothing was written at this item: many templates search through all messages before
            # they write the first one.
            continue
        del active[depth:]
        if item is None:
            next_unmatched = 0
        else:
            number = numbers.get(id(item), -1)
            if number < 0 and type(item) is dict and "role" in item:
                number, next_unmatched = _match_rebuilt(item, messages, next_unmatched)
            active.append(number)
        # The innermost loop that is at a message determines the writer.
        new_writer = next((number for number in reversed(active) if number >= 0), -1)
        if new_writer == writer:
            continue
        if position > start:
            regions.append(Region(start, position, writer))
        start, writer = position, new_writer
    if end > start:
        regions.append(Region(start, end, writer))
    return _merge_adjacent(regions)


def _match_rebuilt(item: dict[str, Any], messages: Sequence[Any], start: int) -> tuple[int, int]:
    """Find the source messages of a message built by a template, from `start` on.

    Returns the index of the first of them and of the message after the last; (-1, start) if there
    are none.
    """
    role, content = item["role"], item.get("content") or ""
    for first in range(start, len(messages)):
        merged = ""
        for last in range(first, len(messages)):
            part = messages[last].get("content") or ""
            if messages[last].get("role") != role or not isinstance(part, str):
                break
            # Templates that merge messages put an empty line between their contents.
            merged = part if last == first else f"{merged}\n\n{part}"
            if merged == content:
                return first, last + 1
    return -1, start


def _merge_adjacent(regions: list[Region]) -> tuple[Region, ...]:
    merged: list[Region] = []
    for region in regions:
        if merged and merged[-1].message == region.message and merged[-1].last == region.first:
            merged[-1] = Region(merged[-1].first, region.last, region.message)
        else:
            merged.append(region)
    return tuple(merged)


def _with_reports(body: list[nodes.Node], depth: int, identifier: str) -> list[nodes.Node]:
    """Return statements with a report of the items in each loop."""
    result: list[nodes.Node] = []
    for node in body:
        result.append(node)
        if isinstance(node, nodes.If):
            for branch in (node, *node.elif_):
                branch.body = _with_reports(branch.body, depth, identifier)
            node.else_ = _with_reports(node.else_, depth, identifier)
        elif isinstance(node, nodes.With):
            node.body = _with_reports(node.body, depth, identifier)
        elif isinstance(node, nodes.For) and not _writes_output(node):
            continue  # a loop that only inspects the messages
        elif isinstance(node, nodes.For) and isinstance(node.target, nodes.Name):
            item = nodes.Name(node.target.name, "load", lineno=node.lineno)
            node.body = [
                _report_statement(depth, item, node, identifier),
                *_with_reports(node.body, depth + 1, identifier),
            ]
            none = nodes.Const(None, lineno=node.lineno)
            result.append(_report_statement(depth, none, node, identifier))
        elif isinstance(node, nodes.For):
            # A target such as `key, value` cannot be a message.
            node.body = _with_reports(node.body, depth, identifier)
        # Macros, block assignments and generation blocks collect their output in a buffer of their
        # own, so positions inside them would be meaningless.
    return result


def _writes_output(loop: nodes.For) -> bool:
    return next(loop.find_all((nodes.Output, nodes.CallBlock)), None) is not None


def _report_statement(
    depth: int, item: nodes.Expr, loop: nodes.For, identifier: str
) -> nodes.ExprStmt:
    method = nodes.ExtensionAttribute(identifier, "_turn", lineno=loop.lineno)
    arguments = [nodes.Const(depth, lineno=loop.lineno), item]
    return nodes.ExprStmt(
        nodes.Call(method, arguments, [], None, None, lineno=loop.lineno), lineno=loop.lineno
    )
