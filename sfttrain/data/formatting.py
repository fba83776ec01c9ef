"""A user's function that makes texts of rows: called once a row, or on columns of several rows, as
older TRL did."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

from sftprep.errors import ConfigError

FormattingFunction = Callable[[Any], "str | list[str]"]
Row = Mapping[str, Any]

_BATCH = 1000


def formatted(
    rows: Iterable[Row], function: FormattingFunction, text_field: str
) -> Iterator[dict[str, str]]:
    """The rows as `{text_field: text}`, and nothing else of them.

    A function that returns text is called once a row. One that returns a list is either of the
    older kind, called with a dictionary of columns for several rows and returning a text for each;
    or it makes several texts of one row. Which one is found out by calling it on two rows and on
    three. Raises ConfigError where it returns something else, or fails.
    """
    remaining = iter(rows)
    first = list(islice(remaining, 3))
    if not first:
        return
    every = chain(first, remaining)
    if _is_for_columns(function, first):
        for number, batch in enumerate(_batches(every)):
            texts = _texts_of(
                function, _columns(batch), f"in the {len(batch)} rows after row {number * _BATCH}"
            )
            if len(texts) != len(batch):
                raise ConfigError(
                    f"formatting_func returned {len(texts)} texts for {len(batch)} rows",
                    remedy="return one text a row",
                )
            yield from ({text_field: text} for text in texts)
        return
    for number, row in enumerate(every, 1):
        yield from ({text_field: text} for text in _texts_of(function, row, f"at row {number}"))


def _is_for_columns(function: FormattingFunction, first: list[Row]) -> bool:
    """Whether the function takes columns: a list for the first row, and one text a row for two rows
    and for three."""
    try:
        if isinstance(function(first[0]), str):
            return False
    except Exception:
        # A function for columns may well fail on a row; one for rows fails on its first row again,
        # where the user sees it.
        return _one_text_a_row(function, first)
    return _one_text_a_row(function, first)


def _one_text_a_row(function: FormattingFunction, first: list[Row]) -> bool:
    for count in (2, 3):
        rows = [first[number % len(first)] for number in range(count)]
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


def _texts_of(function: FormattingFunction, given: Any, where: str) -> list[str]:
    try:
        result = function(given)
    except Exception as error:
        raise ConfigError(
            f"formatting_func failed {where}: {type(error).__name__}: {error}",
            remedy="mend the function, or the row",
        ) from error
    texts = [result] if isinstance(result, str) else result
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        found = (
            type(result).__name__
            if not isinstance(result, list)
            else "list that holds something else"
        )
        raise ConfigError(
            f"formatting_func returned a {found}",
            remedy="return the text of the row, or a list of texts",
        )
    return texts
