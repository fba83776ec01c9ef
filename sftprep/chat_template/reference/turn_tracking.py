"""Which message wrote which part of a rendered conversation: loops of a chat template note the item
that they are at.

A statement is put at the start of each loop of the syntax tree, and one after it. What is written
while a loop is at a message belongs to that message; loops over other things (tools, parts of a
content) change nothing. Both ways of rendering run the same tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes

Mark = tuple[int, int, Any]
"""Position in the output, depth of the loop from 0, and the item that it is at: None after the
loop."""


class Region(NamedTuple):
    """Characters [first, last) of a rendered conversation, and the number of the message that wrote
    them: -1 for none."""

    first: int
    last: int
    message: int


def note_turns(tree: nodes.Template, environment: jinja2.Environment, identifier: str) -> None:
    """Make the loops of a template call the method `_turn(depth, item)` of the extension with this
    identifier."""
    tree.body = _noted(tree.body, 0, identifier)
    tree.set_environment(environment)


def turn_of(node: nodes.ExprStmt) -> tuple[int, nodes.Expr | None] | None:
    """Depth and item of a statement that `note_turns` made, the item None after a loop; None for
    any other statement."""
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
    """The parts of a text of `end` characters, in order, none empty; neighbours are of different
    messages.

    Templates that make new messages, some of them out of several neighbours of one role, are
    followed by role and content; what came of several belongs to the first.
    """
    numbers = {id(message): number for number, message in enumerate(messages)}
    levels: list[int] = []
    found: list[Region] = []
    start, writer, following = 0, -1, 0
    after = [*marks[1:], (end, -1, None)]
    for (position, depth, item), (next_position, next_depth, _) in zip(marks, after, strict=False):
        if next_position == position and next_depth == depth and item is not None:
            # Nothing was written at this item: templates look through all messages before they
            # write the first.
            continue
        del levels[depth:]
        if item is None:
            following = 0
        else:
            number = numbers.get(id(item), -1)
            if number < 0 and type(item) is dict and "role" in item:
                number, following = _remade(item, messages, following)
            levels.append(number)
        now = next((level for level in reversed(levels) if level >= 0), -1)
        if now == writer:
            continue
        if position > start:
            found.append(Region(start, position, writer))
        start, writer = position, now
    if end > start:
        found.append(Region(start, end, writer))
    return _joined(found)


def _remade(item: dict[str, Any], messages: Sequence[Any], following: int) -> tuple[int, int]:
    """The message from `following` on that a new message was made of, and the one after it: -1
    where there is none."""
    role, content = item["role"], item.get("content") or ""
    for first in range(following, len(messages)):
        made = ""
        for last in range(first, len(messages)):
            own = messages[last].get("content") or ""
            if messages[last].get("role") != role or not isinstance(own, str):
                break
            made = own if last == first else f"{made}\n\n{own}"
            if made == content:
                return first, last + 1
    return -1, following


def _joined(found: list[Region]) -> tuple[Region, ...]:
    joined: list[Region] = []
    for region in found:
        if joined and joined[-1].message == region.message and joined[-1].last == region.first:
            joined[-1] = Region(joined[-1].first, region.last, region.message)
        else:
            joined.append(region)
    return tuple(joined)


def _noted(body: list[nodes.Node], depth: int, identifier: str) -> list[nodes.Node]:
    noted: list[nodes.Node] = []
    for node in body:
        noted.append(node)
        if isinstance(node, nodes.If):
            for branch in (node, *node.elif_):
                branch.body = _noted(branch.body, depth, identifier)
            node.else_ = _noted(node.else_, depth, identifier)
        elif isinstance(node, nodes.With):
            node.body = _noted(node.body, depth, identifier)
        elif isinstance(node, nodes.For) and not _writes(node):
            continue  # a loop that only looks at the messages
        elif isinstance(node, nodes.For) and isinstance(node.target, nodes.Name):
            item = nodes.Name(node.target.name, "load", lineno=node.lineno)
            node.body = [
                _statement(depth, item, node, identifier),
                *_noted(node.body, depth + 1, identifier),
            ]
            noted.append(_statement(depth, nodes.Const(None, lineno=node.lineno), node, identifier))
        elif isinstance(node, nodes.For):
            node.body = _noted(node.body, depth, identifier)
        # Macros, block assignments and generation blocks collect what they write, so positions
        # inside them say nothing.
    return noted


def _writes(loop: nodes.For) -> bool:
    return next(loop.find_all((nodes.Output, nodes.CallBlock)), None) is not None


def _statement(depth: int, item: nodes.Expr, loop: nodes.For, identifier: str) -> nodes.ExprStmt:
    method = nodes.ExtensionAttribute(identifier, "_turn", lineno=loop.lineno)
    arguments = [nodes.Const(depth, lineno=loop.lineno), item]
    return nodes.ExprStmt(
        nodes.Call(method, arguments, [], None, None, lineno=loop.lineno), lineno=loop.lineno
    )
