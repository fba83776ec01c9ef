"""Spellings of a value in the text of a chat template: raw, as JSON, and as Python."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

_UNESCAPED = re.compile(r"[A-Za-z0-9 .,]{8,64}")
"""A part of a string that JSON and Python write unchanged."""


def occurs(value: str | int | float, text: str) -> bool:
    """Return whether a text contains a value in any spelling."""
    return any(form in text for form in iter_spellings(value))


def cannot_be_in(value: str | int | float, text: str) -> bool:
    """Return whether a text certainly contains no spelling of a value.

    This is certain if the text lacks a part common to all spellings.
    """
    if not isinstance(value, str):
        return False
    shared = _UNESCAPED.search(value)
    return shared is not None and shared[0] not in text


def iter_spellings(value: str | int | float) -> Iterator[str]:
    """Yield the forms of a value in templates, the frequent ones first."""
    if not isinstance(value, str):
        yield json.dumps(value)
        yield str(value)
        return
    yield value
    once = _json_spellings(value)
    yield from once
    # The arguments as JSON text that is written as JSON.
    for form in once:
        yield from _json_spellings(form)
    if (shown := repr(value)[1:-1]) != value:
        yield shown


def _json_spellings(value: str) -> list[str]:
    """Return the forms of a string inside JSON, if they differ from the string.

    The forms are with and without characters beyond ASCII, and as `tojson` escapes the string.
    """
    forms = []
    for ascii_only in (False, True):
        form = json.dumps(value, ensure_ascii=ascii_only)[1:-1]
        html = form
        for character, code in (("<", "003c"), (">", "003e"), ("&", "0026"), ("'", "0027")):
            html = html.replace(character, f"\\u{code}")
        forms += [form, html]
    return [form for form in dict.fromkeys(forms) if form != value]
