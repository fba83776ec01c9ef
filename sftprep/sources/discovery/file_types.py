"""Kinds of files, by their names."""

from __future__ import annotations

import os

from sftprep.sources.readers.lines import COMPRESSION

_TEXT = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "document",
    ".csv": "delimited",
    ".tsv": "delimited",
}
SUFFIXES: dict[str, str] = {
    **{f"{name}{packed}": kind for name, kind in _TEXT.items() for packed in ("", *COMPRESSION)},
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
}
"""How the name of a file ends -> its kind, a key of `sources.partition.KINDS`."""

_ABOUT_DATA = frozenset(
    {
        "dataset_info.json",
        "dataset_infos.json",
        "dataset_dict.json",
        "state.json",
        "manifest.json",
        "metadata.json",
        "config.json",
    }
)
"""Files that describe data and contain none; in a folder they are skipped."""


def kind_of(file: str) -> str | None:
    """Return the kind of a file by its name, None if it is not read."""
    name = os.path.basename(file)
    return next((kind for suffix, kind in SUFFIXES.items() if name.endswith(suffix)), None)


def is_data(path: str) -> bool:
    """Whether a path in a folder is of a file that is read: not hidden, and not about the data."""
    return (
        kind_of(path) is not None
        and os.path.basename(path) not in _ABOUT_DATA
        and not f"/{path}".count("/.")
    )


def is_about_data(path: str) -> bool:
    """Whether a file of this name is no data by its nature: a description, a README, a licence."""
    name = os.path.basename(path)
    return name in _ABOUT_DATA or name.upper().startswith(("README", "LICENSE", "LICENCE"))


def is_named_like_metadata(path: str) -> bool:
    """Whether a file is skipped for its name alone, and may hold records all the same."""
    name = os.path.basename(path)
    if not is_about_data(path) or kind_of(name.lower()) is None:
        return False
    # A folder of `datasets` has these by its format.
    saved = os.path.exists(os.path.join(os.path.dirname(path), "dataset_info.json"))
    return not name.startswith(("dataset_info", "dataset_dict")) and (
        not saved or name != "state.json"
    )
