"""User-provided functions from records to records.

They are applied before anything else reads the records.

1. A transform takes a parsed record, and returns a record, several, or why there is none.
2. A formatting function takes what the transform returned, with renamed keys, and returns texts,
   which become records with the key `text`.

The results are lines of JSON again, so that they are read like lines of a file: with the same
checks, in any format.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import GeneratorType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftprep.core.json_values import describe_json_type
from sftprep.core.omissions import COLUMN_NOT_READ
from sftprep.core.types import Example, Rejected, TokenBatch
from sftprep.errors import escape_control, first_line
from sftprep.records.options import (
    InvalidRecord,
    Record,
    parse_exactly,
    rename_keys,
    repeated_key_error,
)
from sftprep.records.unread_turns import find_replaced
from sftprep.sources.readers.jsonl import excerpt, parse_line, parse_lines, split_lines
from sftprep.sources.readers.to_jsonl import iter_lines

_MOST_REASONS = 50
"""Reasons that are counted under their name; a function may make as many as there are records."""
_OTHER = "other"
_LONGEST_REASON = 80
_RESERVED_REASONS = {
    "no_assistant_turn",
    "no_token",
    "no_trained_token",
    "of_rejected_record",
    "overlong",
}
"""Reasons for which later stages drop sequences."""
FORMATTED_KEY = "text"
"""The key of the texts of a formatting function."""


@dataclass(frozen=True, slots=True)
class Drop:
    """The result of a transform for an unused record.

    Attributes:
        reason: A short stable name, which the ledger counts.

    Example:
        def keep_english(record):
            return record if record["lang"] == "en" else Drop("other_language")
    """

    reason: str = "transform"


@dataclass(frozen=True, slots=True)
class RecordFunctions:
    """The functions of the user for the records of one source.

    Attributes:
        transform: Makes records of a record; None if there is none.
        formatting: Makes texts of a record; None if there is none.
        renames: The keys to rename before `formatting`, as pairs of old and new name.
    """

    transform: Callable[[Record], Any] | None = None
    formatting: Callable[[Record], Any] | None = None
    renames: tuple[tuple[str, str], ...] = ()

    def apply(self, record: Record, replaced: Record | None = None) -> Iterator[Record | Drop]:
        """Yield the records made of a record, and a Drop for each unused one.

        Args:
            record: The record.
            replaced: Receives the values that `renames` replaces, by their original key.

        Raises:
            InvalidRecord: A function raised an exception, or returned something else.
        """
        results = [record] if self.transform is None else _transform(record, self.transform)
        for result in results:
            if self.formatting is None or isinstance(result, Drop):
                yield result
            else:
                renamed = rename_keys(dict(result), self.renames, replaced)
                yield from ({FORMATTED_KEY: text} for text in _format(renamed, self.formatting))


@dataclass(slots=True)
class TransformedLines:
    """The lines made of a partition by functions of the user.

    Attributes:
        data: The lines, one for each record.
        line_of: int64 [records]; the line of the partition from which each record was made.
        rejected: The lines that are not records, or for which a function failed.
        counts: The numbers of lines and records of the partition, of dropped records, and of
            records with a value that a renamed key replaced.
        first_lines: By the name of a count, the line of the first record that it counts.
        unread_columns: The columns with a value that a renamed key replaced, in order.
    """

    data: bytes
    line_of: NDArray[np.int64]
    rejected: list[Rejected] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    first_lines: dict[str, int] = field(default_factory=dict)
    unread_columns: dict[str, None] = field(default_factory=dict)

    def restore_lines(self, batch: TokenBatch) -> TokenBatch:
        """Convert the batch of `data` to that of the original partition."""
        for rejected in batch.rejected:
            number, rejected.line = rejected.line, int(self.line_of[rejected.line])
            rejected.column = 0  # it is one of the result, not of the line in the file
            first, end = np.searchsorted(self.line_of, [rejected.line, rejected.line + 1]).tolist()
            if end - first > 1:
                rejected.message += f" (result {number - first + 1} of {end - first})"
        counts = Counter(batch.counts)
        for name in ("lines", "blank", "records"):
            del counts[name]
        counts.update(self.counts)
        first_lines = {name: int(self.line_of[line]) for name, line in batch.first_lines.items()}
        return replace(
            batch,
            line_of=self.line_of[batch.line_of],
            record=batch.line_of,
            rejected=sorted([*self.rejected, *batch.rejected], key=lambda each: each.line),
            counts=dict(counts),
            first_lines={**first_lines, **self.first_lines},
            unread_columns=[*dict.fromkeys([*self.unread_columns, *batch.unread_columns])],
        )


def transform_lines(data: bytes, functions: RecordFunctions) -> TransformedLines:
    """Apply functions to all records of a partition.

    Args:
        data: The lines of the partition.
        functions: The functions.

    Example:
        data = b'{"n": 2}\\n{"n": 0}\\n', a transform that returns [{"text": "a"}] * n
            ->  data = b'{"text":"a"}\\n{"text":"a"}\\n', line_of = [0, 0]
    """
    lines = split_lines(data)
    output = TransformedLines(b"", np.zeros(0, np.int64), counts=Counter(lines=len(lines)))
    parts: list[bytes] = []
    line_of: list[int] = []
    # Two results of a record add one to the records of the ledger.
    extra = "extra.transform" if functions.formatting is None else "extra.texts"
    for number, line, record, repeated_key in parse_lines(data, lines):
        if record is None:
            output.counts["blank"] += 1
            continue
        output.counts["records"] += 1
        try:
            if isinstance(record, Rejected):
                output.rejected.append(record)
                continue
            if repeated_key is not None:
                raise repeated_key_error(repeated_key)
            replaced: Record = {}
            results = list(functions.apply(parse_exactly(line, record), replaced))
        except InvalidRecord as problem:
            output.rejected.append(Rejected(number, 0, problem.reason, str(problem), excerpt(line)))
            continue
        output.counts[extra] += len(results) - 1
        if replaced:
            _count_replaced(output, replaced, results, number)
        for result in results:
            if isinstance(result, Drop):
                _count_dropped(output, result.reason, number)
        written = [*iter_lines(result for result in results if not isinstance(result, Drop))]
        parts += written
        line_of += [number] * len(written)
    output.data, output.line_of = b"".join(parts), np.array(line_of, np.int64)
    output.counts.setdefault("blank", 0)
    output.counts.setdefault("records", 0)
    return output


def merge_rare_reasons(counts: Counter[str]) -> None:
    """Count all but the most frequent reasons of a transform under one name.

    Args:
        counts: The sum of the counts of several partitions, which is changed.
    """
    kept = {f"dropped.{reason}" for reason in (_OTHER, *_RESERVED_REASONS)}
    names = [name for name in counts if name.startswith("dropped.") and name not in kept]
    for name in sorted(names, key=lambda name: (-counts[name], name))[_MOST_REASONS:]:
        counts[f"dropped.{_OTHER}"] += counts.pop(name)


def is_transform_reason(reason: str) -> bool:
    """Return whether a reason of dropped records is one of a transform."""
    return reason not in _RESERVED_REASONS


def add_counts(
    counts: Counter[str],
    first_origins: dict[str, int],
    batch: TokenBatch,
    origins: NDArray[np.int64],
) -> None:
    """Add the counts and first origins of a block to those of its lane.

    Args:
        counts: The counts of the lane, which are changed.
        first_origins: By the name of a count, the origin of its first record; it is changed.
        batch: The sequences of the block.
        origins: int64 [lines]; the origin of each line of the block.
    """
    counts.update(batch.counts)
    merge_rare_reasons(counts)
    for name, line in batch.first_lines.items():
        if name in counts:
            first_origins.setdefault(name, int(origins[line]))


def transformed_records(records: Iterable[Record], functions: RecordFunctions) -> Iterator[Record]:
    """Yield the results of functions for some records; skip records with errors."""
    for record in records:
        try:
            results = [*functions.apply(record)]
        except InvalidRecord:
            continue
        for line in iter_lines(result for result in results if not isinstance(result, Drop)):
            new_record = parse_line(line.rstrip(b"\n"), 0)
            if isinstance(new_record, dict):
                yield new_record


def _count_dropped(output: TransformedLines, reason: str, line: int) -> None:
    reason = escape_control(reason.strip())[:_LONGEST_REASON]
    name = f"dropped.{reason}{' (transform)' if reason in _RESERVED_REASONS else ''}"
    if name not in output.first_lines and len(output.first_lines) >= _MOST_REASONS:
        name = f"dropped.{_OTHER}"
    output.counts[name] += 1
    output.first_lines.setdefault(name, line)


def _count_replaced(
    output: TransformedLines, replaced: Record, results: list[Record | Drop], line: int
) -> None:
    """Count the columns that renamed keys replaced, so that no function receives them."""
    texts = [result[FORMATTED_KEY] for result in results if not isinstance(result, Drop)]
    example = Example(line, text="\n".join(texts), replaced=replaced)
    for key in find_replaced(example):
        name = f"warnings.{COLUMN_NOT_READ}{key}"
        output.counts[name] += 1
        output.first_lines.setdefault(name, line)
        output.unread_columns[key] = None


def _transform(record: Record, function: Callable[[Record], Any]) -> list[Record | Drop]:
    """Return the results of a transform; an empty list becomes a Drop."""
    try:
        returned = function(record)
        is_list = isinstance(returned, (list, tuple, GeneratorType))
        results = ([*returned] or [None]) if is_list else [returned]
    except (Exception, SystemExit) as error:
        # The function may raise anything; the error concerns this record only.
        raise InvalidRecord(
            "transform_failed", f"the transform raised {_describe(error)}"
        ) from error
    return [Drop() if result is None else _check_result(result) for result in results]


def _check_result(result: Any) -> Record | Drop:
    if isinstance(result, Mapping):
        return result  # type: ignore[return-value]  # it is written as JSON, as any mapping
    if isinstance(result, Drop) and isinstance(result.reason, str) and result.reason.strip():
        return result
    is_drop = isinstance(result, Drop)
    what = "a Drop without reason" if is_drop else describe_json_type(result)
    raise InvalidRecord(
        "transform_failed",
        f"the transform returned {what}; it must return a record (a dictionary), a list of"
        ' records, sftprep.Drop("reason") or None',
    )


def _describe(error: BaseException) -> str:
    """Return the type and the text of an exception, in one printable line."""
    try:
        return escape_control(f"{type(error).__name__}: {first_line(error, 500)}")
    except Exception:  # the class is the user's, and so is its __str__
        return type(error).__name__


def _format(record: Record, function: Callable[[Record], Any]) -> list[str]:
    """Return the texts of a formatting function."""
    try:
        result = function(record)
    except (Exception, SystemExit) as error:
        raise InvalidRecord(
            "function_failed", f"the formatting function raised {_describe(error)}"
        ) from error
    texts = [result] if isinstance(result, str) else result
    if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
        return texts
    what = describe_json_type(result)
    if isinstance(result, list):
        what = "a list with other values" if result else "an empty list"
    raise InvalidRecord(
        "bad_function_result",
        f"the formatting function returned {what}, not a string or a list of strings",
    )
