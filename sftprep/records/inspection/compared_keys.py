"""Check of the keys by which records are compared, before the first pass."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from sftprep.errors import ConfigError, setting, source_name
from sftprep.records.inspection.source_reading import SourceReading

_SHOWN_KEYS = 12


def check_compared_keys(
    keys: Sequence[str], names: Sequence[str], readings: Sequence[SourceReading]
) -> None:
    """Check that some input has each key of `duplicates_by`.

    Pass 1 counts the records without a key that others have.

    Args:
        keys: The keys of the setting.
        names: The names of the inputs, those for training first.
        readings: How each training input is read, with the keys of its first records.

    Raises:
        ConfigError: No input has a key. The remedy is the most similar key.
    """
    known = sorted({key for reading in readings for key in reading.keys})
    if not known:
        return
    for key in keys:
        if key in known:
            continue
        similar = difflib.get_close_matches(key, known, n=1)
        similar = similar or [name for name in known if name.lower() == key.lower()]
        others = f" and {len(readings) - 1:,} more inputs" if len(readings) > 1 else ""
        where = source_name(names[0]) + others
        more = ", ..." if len(known) > _SHOWN_KEYS else ""
        raise ConfigError(
            f"{setting('duplicates_by')}: none of the first records of {where} has the key {key!r};"
            f" their keys are {', '.join(map(repr, known[:_SHOWN_KEYS]))}{more}",
            remedy=(
                f"did you mean {setting('duplicates_by', similar[0])}?"
                if similar
                else f"name a key of the records, or leave out {setting('duplicates_by')}"
            ),
        )
