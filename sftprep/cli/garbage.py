"""The command `sftprep gc`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import timedelta
from typing import Annotated, Any

from cyclopts import Parameter

from sftprep.cli.app import app
from sftprep.cli.console import print_json
from sftprep.errors import ConfigError, format_count, setting

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def _read_age(kind: Any, tokens: Sequence[Any]) -> timedelta:
    """Return an age such as 7d, 12h or 1d12h."""
    text = tokens[0].value
    parts = re.findall(r"(\d+)([smhdw])", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ConfigError(
            f"{setting('older_than', text)} is not an age",
            remedy="write a number with a unit: s, m, h, d or w, such as 7d or 12h",
        )
    ages = (timedelta(**{_UNITS[unit]: int(number)}) for number, unit in parts)
    return sum(ages, timedelta())


@app.command
def gc(
    url: str,
    *,
    older_than: Annotated[timedelta, Parameter(converter=_read_age)] = timedelta(days=7),
    dry_run: bool = False,
    json: bool = False,
    debug: bool = False,
) -> int:
    """Remove what killed builds left in an object store.

    Only files with the names of builds are removed, and never those of the current build.

    Parameters
    ----------
    url
        The output of builds, such as s3://bucket/folder.
    older_than
        Least age of what is removed, such as 7d or 12h. It must be longer than a build takes.
    dry_run
        Show what would be removed, and remove nothing.
    json
        Print the result as JSON.
    debug
        Show a traceback with errors.
    """
    from sftprep.pipeline.output.garbage import collect_garbage

    removed = collect_garbage(url, older_than, dry_run=dry_run)
    size = sum(file.mark.size for file in removed)
    if json:
        names = [file.url for file in removed]
        print_json({"removed": names, "bytes": size, "dry_run": dry_run})
        return 0
    if dry_run:
        print("\n".join(file.url for file in removed))
    verb = "would remove" if dry_run else "removed"
    print(f"{verb} {format_count(len(removed), 'file')} of {size:,} bytes")
    return 0
