"""Rejected records of a stream, their limit, and records with omissions."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping

from sftprep.config.build import BuildConfig
from sftprep.core.omissions import SYSTEM_ADDED
from sftprep.core.types import Rejected, TokenBatch
from sftprep.errors import (
    EmptyInput,
    PythonNames,
    RecordError,
    TooManyRejected,
    escape_control,
    front_end,
    render_settings,
    setting,
)
from sftprep.pipeline.groups.ledgers import (
    correction_for,
    corrections_for,
    first_of_each_drop,
    first_of_each_reason,
    remedies_for_transform,
)
from sftprep.records.transform import is_transform_reason
from sftprep.shards.length_advice import cut_notice
from sftprep.shards.warning_kinds import DataWarning
from sftprep.stream.settings import CHECK_SETTINGS
from sftprep.stream.sources.base import Block

_log = logging.getLogger(__name__)

_KEPT_RECORDS = 100
_NOT_LOGGED = ("suspects_rejected", "images_dropped", "reasoning_removed", SYSTEM_ADDED)
"""Warnings about what the settings request, or about records that are reported as rejected."""
_LENGTH = "max_length"
"""The name of the warning about the length limit among those that were logged."""
_MIN_RECORDS_FOR_SHARE = 1000
"""A share of rejected records is applied to at least this many, since a share of the first few
records is meaningless."""


class Rejections:
    """The quarantined records of a stream.

    Attributes:
        latest: The last 100 records: name of the input, line or row, and reason.

    Args:
        config: The settings of the stream.
        max_length: The limit of the lengths of sequences.
    """

    def __init__(self, config: BuildConfig, max_length: int) -> None:
        self._output, self._format, self._max_length = config.output, config.format, max_length
        self._warned: set[str] = set()  # the kinds of warnings that were logged
        # Bounded, since a stream can run for weeks.
        self.latest: deque[tuple[str, int, Rejected]] = deque(maxlen=_KEPT_RECORDS)
        self._firsts: dict[str, tuple[str, int, Rejected]] = {}  # the first of each reason

    def examine(
        self,
        block: Block,
        batch: TokenBatch,
        locate: Callable[[int], tuple[str, int]],
        counts: Callable[[], Mapping[str, int]],
    ) -> None:
        """Quarantine the rejected records of a block, and log each kind of warning once.

        Args:
            block: The block.
            batch: Its sequences.
            locate: Returns the name of the input, and the line or row, of an origin.
            counts: Returns the counters of the stream, which include this block.

        Raises:
            RecordError: A record is rejected, and bad records are errors.
            TooManyRejected: More records than allowed were rejected.
        """
        for rejected in batch.rejected:
            self.add(*locate(int(block.origins[rejected.line])), rejected, counts())
        for name, line in batch.first_lines.items():
            kind = name.removeprefix("warnings.")
            if kind in self._warned or kind == name or kind in _NOT_LOGGED:
                continue
            self._warned.add(kind)
            first = locate(int(block.origins[line]))
            _log.warning("%s", escape_control(DataWarning(kind, 0, *first).render()))
        if _LENGTH not in self._warned:  # to add up the counters of all lanes takes time
            self.warn_of_cuts(counts(), at_end=False)

    def warn_of_cuts(self, counts: Mapping[str, int], *, at_end: bool) -> None:
        """Log once that the length limit cuts much, when the share is known.

        Args:
            counts: Counters of the stream.
            at_end: Whether all records of the pass were read.
        """
        is_known = at_end or counts.get("records", 0) >= _MIN_RECORDS_FOR_SHARE
        if not is_known or _LENGTH in self._warned:
            return
        text = cut_notice(counts, self._max_length)
        if text:
            self._warned.add(_LENGTH)
            _log.warning("%s", render_settings(text, front_end.get(PythonNames())))

    def add(self, name: str, line: int, rejected: Rejected, counts: Mapping[str, int]) -> None:
        """Quarantine a record, or raise its error.

        Args:
            name: The name of the input.
            line: The line or row, from 1.
            rejected: The record.
            counts: Counters of the stream, which include this record.

        Raises:
            RecordError: Bad records are errors.
            TooManyRejected: More records than allowed were rejected.
        """
        if self._output.on_bad_record == "error":
            raise RecordError(
                file=name,
                line=line,
                column=rejected.column,
                reason=rejected.reason,
                message=rejected.message,
                excerpt=rejected.excerpt,
                correction=correction_for(rejected.reason, self._format),
            )
        self.latest.append((name, line, rejected))
        self._firsts.setdefault(rejected.reason, (name, line, rejected))
        self.check(counts, at_end=False)

    def check(self, counts: Mapping[str, int], *, at_end: bool) -> None:
        """Raise TooManyRejected if more records were rejected than the settings allow.

        Args:
            counts: Counters of the stream.
            at_end: Whether all records of the pass were read.
        """
        rejected = sum(count for name, count in counts.items() if name.startswith("rejected."))
        records = counts.get("records", 0)
        limit = self._output.rejected_limit(
            records if at_end else max(records, _MIN_RECORDS_FOR_SHARE)
        )
        if rejected > limit:
            raise TooManyRejected(
                f"{rejected:,} of {records:,} records were rejected, more than"
                f" {setting('max_rejected', self._output.max_rejected)} allows"
                + self.describe_first(),
                remedy=[
                    *self._corrections(),
                    "fix the records",
                    f"raise {setting('max_rejected')}",
                ],
            )

    def empty_pass(
        self,
        counts: Mapping[str, int],
        first_origins: Iterable[tuple[str, int]],
        locate: Callable[[int], tuple[str, int]],
    ) -> EmptyInput:
        """Return the error for a pass without a sequence.

        Args:
            counts: Counters of the stream.
            first_origins: Names of counts, with the origin of the first record of some lane.
            locate: Returns the name of the input, and the line or row, of an origin.
        """
        dropped = sorted(
            (*locate(origin), name.removeprefix("dropped."))
            for name, origin in first_origins
            if name.startswith("dropped.")
        )
        by_transform = sum(
            counts[f"dropped.{reason}"]
            for reason in {reason for *_, reason in dropped}
            if is_transform_reason(reason)
        )
        remedies = [
            *self._corrections(),
            *remedies_for_transform(by_transform, counts.get("records", 0)),
        ]
        is_explained = bool(remedies) and not dropped and len(self._firsts) == 1
        return EmptyInput(
            f"a whole pass gave no sequence that can be trained on ({dict(counts) or 'no record'})"
            + self.describe_first()
            + first_of_each_drop(dropped),
            remedy=remedies if is_explained else [*remedies, CHECK_SETTINGS],
        )

    def _corrections(self) -> list[str]:
        return [*corrections_for(self._firsts, self._format)]

    def describe_first(self) -> str:
        """Return text for an error: the first rejected record of each reason."""
        return first_of_each_reason(self._firsts.values())
