"""Helpers for the text of messages."""

from __future__ import annotations


def escape_control(text: str) -> str:
    """Make control characters and changes of direction visible, except for line breaks."""
    return "".join(
        c if c.isprintable() or c == "\n" else " " if c == "\t" else f"\\u{ord(c):04x}"
        for c in text
    )


def format_count(number: int, noun: str, plural_ending: str = "s") -> str:
    """Return a number with its noun: "1 pack", "2 packs"."""
    return f"{number:,} {noun}{plural_ending if number != 1 else ''}"


def first_line(error: BaseException, limit: int | None = None) -> str:
    """Return the start of the first line of an error's text, or its type's name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:limit]
