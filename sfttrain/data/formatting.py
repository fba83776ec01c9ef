"""A user's formatting function, from rows to texts.

It is called with one row, or with the columns of several rows, as older versions of TRL did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

from sftprep.errors import ConfigError, setting
from sfttrain.data.settings import DataSettings

_USE_FUNCTION = "do the same in formatting_func"

FormattingFunction = Callable[[Any], "str | list[str]"]
Row = Mapping[str, Any]

_BATCH = 1000
"""Rows in a call of a function that takes columns; the batch size of older TRL."""


def format_rows(
    rows: Iterable[Row], function: FormattingFunction, text_field: str
) -> Iterator[dict[str, str]]:
    """Yield `{text_field: text}` for each text from the function.

    A function that returns a string is called once per row. A function that returns a list takes
    either the columns of several rows, and returns one text per row, or one row, and returns
    several texts. Calls on two and on three rows distinguish these cases.

    Args:
        rows: The rows of a dataset.
        function: The user's function.
        text_field: The key of the text in the result.

    Raises:
        ConfigError: If the function returns another type, or raises an exception.

    Example:
        format_rows([{"q": "a"}], lambda row: f"Q: {row['q']}", "text")  ->  {"text": "Q: a"}
    """
    remaining = iter(rows)
    first = list(islice(remaining, 3))
    if not first:
        return
    all_rows = chain(first, remaining)
    if _takes_columns(function, first):
        for number, batch in enumerate(_batches(all_rows)):
            texts = _call(
                function, _columns(batch), f"in the {len(batch)} rows after row {number * _BATCH}"
            )
            if len(texts) != len(batch):
                raise ConfigError(
                    f"formatting_func returned {len(texts)} texts for {len(batch)} rows",
                    remedy="return one text per row",
                )
            yield from ({text_field: text} for text in texts)
        return
    for number, row in enumerate(all_rows, 1):
        yield from ({text_field: text} for text in _call(function, row, f"at row {number}"))


def check_row_settings(settings: DataSettings) -> None:
    """Check that no setting is for rows, which a formatting function makes plain texts.

    Raises:
        ConfigError: One of them would have no effect.
    """
    if settings.train_on == "completion":
        raise ConfigError(
            "formatting_func makes plain texts, which have no completion to train on",
            remedy=[
                f"remove {setting('completion_only_loss')}",
                "pass rows with a prompt and a completion",
            ],
        )
    transformed = f"let the transform return records with the key {settings.text_field}"
    for name, is_set, remedy in (
        ("transform", settings.transform is not None, transformed),
        ("map", bool(settings.map), _USE_FUNCTION),
        ("strip_nulls", settings.strip_nulls, _USE_FUNCTION),
        ("format", settings.format not in ("auto", "text"), "leave out one of the two"),
        ("as_chat", bool(settings.as_chat), "leave out one of the two"),
    ):
        if is_set:
            raise ConfigError(f"formatting_func and {setting(name)} are both given", remedy=remedy)


def _takes_columns(function: FormattingFunction, first_rows: list[Row]) -> bool:
    """Return whether the function takes the columns of several rows."""
    try:
        if isinstance(function(first_rows[0]), str):
            return False
    except Exception:
        # A function of columns may fail on a single row. A function of rows fails on its first row
        # once more in `format_rows`, which reports the error.
        return _returns_text_per_row(function, first_rows)
    return _returns_text_per_row(function, first_rows)


def _returns_text_per_row(function: FormattingFunction, first_rows: list[Row]) -> bool:
    # Two counts are tried because a function of one row may return two texts for any input.
    for count in (2, 3):
        rows = [first_rows[number % len(first_rows)] for number in range(count)]
        try:
            texts = function(_columns(rows))
        except Exception:
            return False
        if (
            not isinstance(texts, list)
            or len(texts) != count
            or not all(isinstance(text, str) for text in texts)
        ):
            return False
    return True


def _columns(rows: list[Row]) -> dict[str, list[Any]]:
    return {name: [row.get(name) for row in rows] for name in rows[0]}


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    remaining = iter(rows)
    while batch := list(islice(remaining, _BATCH)):
        yield batch


def _call(function: FormattingFunction, argument: Any, position: str) -> list[str]:
    """Call the function on one row or on columns, and return the texts."""
    try:
        result = function(argument)
    except Exception as error:
        raise ConfigError(
            f"formatting_func failed {position}: {type(error).__name__}: {error}",
            remedy="fix the function, or the row",
        ) from error
    texts = [result] if isinstance(result, str) else result
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        found = (
            type(result).__name__
            if not isinstance(result, list)
            else "list whose items are not all strings"
        )
        raise ConfigError(
            f"formatting_func returned a {found}",
            remedy="return the text of the row, or a list of texts",
        )
    return texts
