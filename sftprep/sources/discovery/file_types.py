"""Kinds of files, determined from their names."""

from __future__ import annotations

import os

from sftprep.config.validation import TextUnit
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
"""The suffix of a file's name -> its kind, a key of `sources.partition.KINDS`."""

_PLAIN_TEXT = tuple(
    f"{n}{packed}" for n in (".txt", ".text", ".md") for packed in ("", *COMPRESSION)
)
"""Suffixes of plain text, which is only read if the user asks for text."""

_TEXT_KINDS: dict[TextUnit, str] = {"line": "text", "file": "text-file"}

_METADATA_NAMES = frozenset(
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
"""Files that usually describe data and contain no records; a search of a folder skips them."""


def kind_of(file: str, text_unit: TextUnit | None = None) -> str | None:
    """Return the kind of a file, or None if files of its kind are not read.

    Args:
        file: The path or name.
        text_unit: What a record of plain text is; None if plain text is not read.
    """
    name = os.path.basename(file)
    kind = next((kind for suffix, kind in SUFFIXES.items() if name.endswith(suffix)), None)
    if kind is None and text_unit is not None and is_plain_text(name):
        return _TEXT_KINDS[text_unit]
    return kind


def is_plain_text(file: str) -> bool:
    """Return whether a file has the name of plain text."""
    return file.endswith(_PLAIN_TEXT)


def is_data(path: str, text_unit: TextUnit | None = None) -> bool:
    """Return whether a folder search reads a path: not hidden, not metadata."""
    return (
        kind_of(path, text_unit) is not None
        and os.path.basename(path) not in _METADATA_NAMES
        and not (is_plain_text(path) and is_metadata(path))
        and not f"/{path}".count("/.")
    )


def is_metadata(path: str) -> bool:
    """Return whether a file is named as a description, a README or a licence."""
    name = os.path.basename(path)
    return name in _METADATA_NAMES or name.upper().startswith(("README", "LICENSE", "LICENCE"))


def is_named_like_metadata(path: str) -> bool:
    """Return whether a file is skipped only for its name and may contain records."""
    name = os.path.basename(path)
    if not is_metadata(path) or kind_of(name.lower()) is None:
        return False
    # In a folder that `datasets` saved, these files belong to the format.
    saved = os.path.exists(os.path.join(os.path.dirname(path), "dataset_info.json"))
    return not name.startswith(("dataset_info", "dataset_dict")) and (
        not saved or name != "state.json"
    )
