"""The text of tokens on a terminal: trained or not, flags and weights."""

from __future__ import annotations

import re
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from sftprep.core.types import Flag

RESET = "\x1b[0m"
BOUNDARY = "\x1f"
"""The end of a token in a text for `mark_text`. Texts contain no control characters."""

_BOUNDARY_SIGN = "·"
_WORD = re.compile(f"[^ {BOUNDARY}]*[ {BOUNDARY}]|[^ {BOUNDARY}]+")
"""Text up to a place where a line may be broken."""
_COLORS = {True: "\x1b[32m", False: "\x1b[2m"}
"""The color of a text, by whether it is trained: green, and dim."""
_BOUNDARY_COLOR = "\x1b[90m"

_FLAGS = {
    Flag.TRUNCATED: "truncated",
    Flag.SPLIT: "a part of a longer sequence",
    Flag.REPEATED: "repeated",
    Flag.CONTENT_NOT_SHOWN: "the chat template dropped a part of the record",
}


def mark_text(text: str, *, trained: bool, color: bool) -> str:
    """Return a text that shows whether it is trained.

    Args:
        text: The text; it may have several lines, and contain `BOUNDARY`.
        trained: Whether it is trained.
        color: Whether trained text is green, and other text dim; without color, trained text is in
            ⟦ and ⟧.
    """
    if not color:
        text = text.replace(BOUNDARY, _BOUNDARY_SIGN)
        return f"⟦{text}⟧" if trained else text
    # A color ends at the end of its line, so that it never affects what follows an abridged text,
    # or the rest of a pager.
    start = _COLORS[trained]
    colored = "\n".join(f"{start}{line}{RESET}" if line else "" for line in text.split("\n"))
    sign = f"{RESET}{_BOUNDARY_COLOR}{_BOUNDARY_SIGN}{RESET}{start}"
    return colored.replace(BOUNDARY, sign)


def wrap_parts(parts: list[tuple[bool, str]], width: int) -> list[list[tuple[bool, str]]]:
    """Break a line of texts into lines of a width, where possible after a token or a space.

    Args:
        parts: The texts, and whether each is trained.
        width: The number of columns; wide characters take two.

    Example:
        [(False, "Say "), (True, "hello")], width = 6  ->  [[(False, "Say ")], [(True, "hello")]]
    """
    from rich.cells import cell_len, chop_cells  # imported only where a terminal is

    lines: list[list[tuple[bool, str]]] = [[]]
    free = width
    for trained, text in parts:
        for word in _WORD.findall(text):
            # A word that is wider than a line is broken anywhere.
            pieces = chop_cells(word.replace(BOUNDARY, _BOUNDARY_SIGN), width)
            for index, piece in enumerate(pieces):
                needed = cell_len(piece)
                if needed > free and lines[-1]:
                    lines.append([])
                    free = width
                is_end = index == len(pieces) - 1 and word.endswith(BOUNDARY)
                lines[-1].append((trained, piece[:-1] + BOUNDARY if is_end else piece))
                free -= needed
    return [_join_equal(line) for line in lines if line]


def _join_equal(parts: list[tuple[bool, str]]) -> list[tuple[bool, str]]:
    """Join successive texts that are both trained, or both not."""
    return [
        (trained, "".join(text for _, text in run))
        for trained, run in groupby(parts, key=lambda part: part[0])
    ]


def describe_flags(flags: int) -> str:
    """Return what the flags of a sequence say, in parentheses; "" if it has none."""
    described = [text for flag, text in _FLAGS.items() if flags & flag]
    return f" ({', '.join(described)})" if described else ""


def describe_weights(weights: NDArray[np.float32] | None, mask: NDArray[np.bool_]) -> str:
    """Return the distinct loss weights of a sequence's trained tokens, in parentheses.

    Return "" if all are 1.

    Args:
        weights: float32 [n]; None if all are 1.
        mask: bool [n], True for the trained tokens.
    """
    if weights is None:
        return ""
    distinct = list(dict.fromkeys(weights[mask].tolist()))
    if distinct in ([], [1.0]):
        return ""
    return f" (weights {', '.join(f'{weight:g}' for weight in distinct)})"
