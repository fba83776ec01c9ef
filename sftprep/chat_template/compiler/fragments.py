"""Fragments of Python source, built from parts of a chat template."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from jinja2 import nodes

Kind = Literal["text", "int", "texts", "value"]
"""What is known of a value: text, a plain str; int, a plain int; texts, a list of at least one
plain str; value, nothing."""


class Code(NamedTuple):
    """The source of one expression, and what is known of its value."""

    source: str
    kind: Kind = "value"
    literal: str | None = None  # the string, if it is a constant one
    atom: bool = False  # a variable, which may be written several times at no cost
    # Source of the number of anchors that the template itself writes with this value; empty: none.
    # Anchors in constants are counted when the constants are written.
    anchors: str = ""


@dataclass(slots=True)
class Loop:
    """The Python variables of a running `for` with a use of `loop`."""

    sequence: str  # the list of its items
    index: str  # index of the current item
    last: str  # index of the last item


@dataclass(slots=True)
class Macro:
    """A macro available to compiled code."""

    function: str  # its Python function
    parameters: list[str]  # the names of its parameters in the template


def to_literal(text: str) -> Code:
    """Return the code of a constant string."""
    return Code(repr(text), "text", text)


def to_text(code: Code) -> Code:
    """Return a value as the string written by `{{ value }}`."""
    if code.kind == "text":
        return code
    return Code(f"text({code.source})", "text", anchors=code.anchors)


def merge_literals(pieces: Iterable[Code]) -> list[Code]:
    """Return the same pieces, with adjacent constants merged and empty ones removed."""
    merged: list[Code] = []
    for piece in pieces:
        if piece.literal is not None and merged and merged[-1].literal is not None:
            merged[-1] = to_literal(merged[-1].literal + piece.literal)
        elif piece.literal != "":
            merged.append(piece)
    return merged


def summands(node: nodes.Node) -> list[nodes.Node]:
    """Return the parts of a sum, from left to right.

    Adding strings is associative, so a sum of strings may be regrouped.
    """
    return [*summands(node.left), *summands(node.right)] if isinstance(node, nodes.Add) else [node]
