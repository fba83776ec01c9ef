"""How records are read: what a reader of a format is told, what it may raise, and the values that
all of them read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sftprep.sources.readers.to_jsonl import OPAQUE

Record = dict[str, Any]


class InvalidRecord(Exception):
    """A record that does not fit its format. reason: short and stable; the text says what is wrong
    where."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class RecordOptions:
    """How records of one input are read: the keys to rename, the key of plain text, and what the
    template can show.

    chat: there is a chat template; tool_calls: it shows `tool_calls`; reasoning: it shows a turn's
    reasoning; function: makes the text of a record.
    """

    renames: tuple[tuple[str, str], ...] = ()
    text_field: str = "text"
    chat: bool = True
    tool_calls: bool = True
    reasoning: bool = True
    function: Callable[[Record], Any] | None = None


def string_of(value: Any, what: str) -> str:
    """A text. Raises InvalidRecord for anything else."""
    if type(value) is str:
        return value
    if value is None:
        raise InvalidRecord("bad_row", f"{what} is null")
    if type(value) is dict and value.keys() == {OPAQUE}:
        raise InvalidRecord("bad_type", f"{what} holds {value[OPAQUE]}, not text")
    raise InvalidRecord("bad_type", f"{what} is a {type(value).__name__}, not text")


def decoded(value: Any, what: str) -> Any:
    """What stands in JSON text; anything that is no text as it is. Raises InvalidRecord where it is
    no JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InvalidRecord("bad_tool", f"{what} is text, but no JSON: {why}") from error
