"""Pieces of Python source that stand for parts of a chat template."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from jinja2 import nodes

Kind = Literal["text", "int", "texts", "value"]
"""text: a plain str; int: a plain int; texts: a list of at least one plain str; value: anything."""


class Code(NamedTuple):
    """Source of one expression. literal: the text, where it is a constant one; atom: a name, which
    may be written twice; anchors: source of the number of anchors that the template itself writes
    with this value, empty for none (constants are counted when they are written)."""

    source: str
    kind: Kind = "value"
    literal: str | None = None
    atom: bool = False
    anchors: str = ""


@dataclass(slots=True)
class Loop:
    """Names of the Python variables of a running `for`: its sequence, the index of the turn, the
    index of the last turn."""

    sequence: str
    index: str
    last: str


@dataclass(slots=True)
class Macro:
    """A macro that can be called: its Python function and the names of its parameters."""

    function: str
    parameters: list[str]


def literal(text: str) -> Code:
    """A constant text."""
    return Code(repr(text), "text", text)


def shown(code: Code) -> Code:
    """A value as the text that `{{ value }}` writes."""
    if code.kind == "text":
        return code
    return Code(f"text({code.source})", "text", anchors=code.anchors)


def joined(pieces: Iterable[Code]) -> list[Code]:
    """The same parts, with neighbouring constants made one."""
    merged: list[Code] = []
    for piece in pieces:
        if piece.literal is not None and merged and merged[-1].literal is not None:
            merged[-1] = literal(merged[-1].literal + piece.literal)
        elif piece.literal != "":
            merged.append(piece)
    return merged


def summands(node: nodes.Node) -> list[nodes.Node]:
    """The parts of a sum, from left to right. A sum of texts may be regrouped at will."""
    return [*summands(node.left), *summands(node.right)] if isinstance(node, nodes.Add) else [node]
