"""What a user gives as a dataset, as something that can be read from its first row to its last,
more than once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, Protocol

from sftprep.errors import ConfigError
from sfttrain.data.streaming import is_stream


def is_packs(source: Any) -> bool:
    """Whether `source` is packs: by number, as `sftprep.open_shards` gives them, or a stream of
    them."""
    return callable(getattr(source, "seq_lengths", None)) or is_stream(source)


def rows_given(source: Any, name: str) -> Any:
    """The source, or the rows of one that knows them by number only, such as a torch Dataset. name:
    what to call it in messages.

    Raises ConfigError for what can be read once only (a generator): the look at its first rows
    would take them out of the training, and each process of a run would need its own.
    """
    if source is None or is_packs(source) or isinstance(source, (str, bytes, PurePath, Mapping)):
        return source
    if isinstance(source, Iterable):
        if iter(source) is iter(source):
            raise ConfigError(
                f"{name} is a {type(source).__name__}, which can be read once only",
                remedy=(
                    f"give list({name}), or datasets.Dataset.from_generator with the function that"
                    " makes it"
                ),
            )
        return source
    if not hasattr(source, "__getitem__"):
        return source
    if not hasattr(source, "__len__"):
        raise ConfigError(
            f"{name} is a {type(source).__name__} that does not say how many rows it has",
            remedy="give its class a __len__, or make it a datasets.Dataset",
        )
    return NumberedRows(source)


class _ByNumber(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class NumberedRows(Sequence[Any]):
    """Rows of a dataset whose __getitem__ need not know where it ends."""

    def __init__(self, rows: _ByNumber) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any, /) -> Any:
        """One row. Raises IndexError past the last."""
        if not -len(self._rows) <= index < len(self._rows):
            raise IndexError(index)
        return self._rows[index % len(self._rows)]
