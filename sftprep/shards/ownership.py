"""Recognition of files written by a build, by their content.

A file with a name that builds use may still belong to the user. A build removes or replaces a file
in its work folder, or at the final path of one of its files, only if the content shows that a build
wrote it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import xxhash

from sftprep.core.atomic_write import is_temporary_name
from sftprep.core.file_locks import is_lease
from sftprep.core.regular_files import read_regular_file
from sftprep.shards.layout import (
    CARD_NAME,
    COMMIT_NAME,
    EVAL_FOLDER,
    EVAL_MANIFEST_PATTERN,
    GROUP_FILE_PATTERN,
    GROUP_FOLDER,
    HELD_OUT_PATTERN,
    IDENTITY_FIELD,
    IDENTITY_NAME,
    LARGEST_MANIFEST,
    LEASE_NAME,
    LOCK_NAME,
    MANIFEST_NAME,
    MARKER_NAME,
    RECEIPT_FIELD,
    RECEIPT_PATTERN,
    RECIPE_PATTERN,
    REJECTED_FOLDER,
    SENT_SUFFIX,
    SHARD_FOLDER,
    SPILL_PATTERN,
    TOKENIZER_FILES,
    TOKENIZER_FOLDER,
    TOKENIZER_PATTERN,
    has_group,
    has_manifest,
    is_marker,
    is_tokenizer_file,
)
from sftprep.shards.locks import is_lock_content
from sftprep.shards.schema import SHARD_PATTERN

_LARGEST_LINE = 64 * 1024 * 1024  # bytes; a file without line ends is not read into memory
_ARROW_START = b"ARROW1\0\0"
# Of the packs of a group, or of its sequences.
_INDEX_COLUMNS = (
    {"tokens", "trained_tokens", "sequences", "longest"},
    {"tokens", "trained", "origin"},
)
_NUMPY_START = b"\x93NUMPY"
_CARD_START = (
    b"---\n# Written by sftprep, which replaces this file with the next build here, unless it was"
    b" changed: "
)
_COMMIT_KEY = "sftprep_commit"
_REJECTED_KEYS = {"file", "line", "column", "reason", "message", "excerpt"}


def is_work_file(work: Path, name: str) -> bool:
    """Return whether a build wrote a regular file in a work folder.

    Args:
        work: The work folder.
        name: The path of the file, relative to the work folder.
    """
    if is_temporary_name(os.path.basename(name)):
        return True
    test = next((test for pattern, test in _TESTS if pattern.fullmatch(name)), None)
    return test is not None and test(work / name)


def is_final_file(path: Path) -> bool:
    """Return whether a build wrote the file at a final path of a commit."""
    if path.name == MANIFEST_NAME or re.fullmatch(EVAL_MANIFEST_PATTERN, path.name):
        return has_manifest(path)
    if path.name == CARD_NAME:
        return _is_card_file(path)
    if path.parent.parent.name == TOKENIZER_FOLDER:
        return is_tokenizer_file(path)
    if path.parent.name == GROUP_FOLDER:
        return _is_index(path) if path.suffix == ".index" else has_group(path)
    return _is_rejected(path) if path.suffix == ".jsonl" else is_shard(path)


def is_shard(path: Path) -> bool:
    """Return whether a file is a shard of a build, by the schema at its start."""
    schema = _read_arrow_schema(path)
    return schema is not None and (
        {"input_ids", "completion_mask", "origin"} <= set(schema.names)
        and b"huggingface" in (schema.metadata or {})
    )


def _is_index(path: Path) -> bool:
    """Return whether a file is the index of a group, by the schema at its start."""
    schema = _read_arrow_schema(path)
    return schema is not None and any(set(schema.names) >= names for names in _INDEX_COLUMNS)


def mark_card(text: str) -> bytes:
    """Return the content of a data card, with a first line by which builds know it.

    Args:
        text: The rest of its YAML block, and everything after it.
    """
    content = text.encode("utf-8", "backslashreplace")
    return _CARD_START + xxhash.xxh3_128_hexdigest(content).encode() + b"\n" + content


def is_card(content: bytes) -> bool:
    """Return whether bytes are those of a data card that nobody has changed."""
    checksum, _, rest = content.removeprefix(_CARD_START).partition(b"\n")
    return content.startswith(_CARD_START) and checksum == xxhash.xxh3_128_hexdigest(rest).encode()


def _is_card_file(path: Path) -> bool:
    try:
        return is_card(read_regular_file(path, LARGEST_MANIFEST))
    except OSError:
        return False


def commit_bytes(names: list[str]) -> bytes:
    """Return the content of `commit.json`.

    Args:
        names: The paths that the commit puts into place or removes.
    """
    return json.dumps({_COMMIT_KEY: names}).encode()


def committed_names(path: Path) -> list[str] | None:
    """Return the paths in a `commit.json`, or None if no build wrote the file."""
    try:
        names = json.loads(path.read_bytes())[_COMMIT_KEY]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    valid = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if valid else None


def _is_commit(path: Path) -> bool:
    return committed_names(path) is not None


def _is_lock(path: Path) -> bool:
    return is_lock_content(path.read_bytes()) if path.stat().st_size < 4096 else False


def _is_lease(path: Path) -> bool:
    return is_lease(path.read_bytes()) if path.stat().st_size < 4096 else False


def _is_spill(path: Path) -> bool:
    """Return whether a file is a spill, complete or torn by a crash of the machine."""
    schema = _read_arrow_schema(path)
    if schema is None:
        return _is_zeros(path)
    # Spills are recognized by the keys of their metadata, see pipeline/passes/spill.py.
    return "origin" in schema.names and {b"facts", b"digest"} <= (schema.metadata or {}).keys()


def _is_array(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(_NUMPY_START)) == _NUMPY_START


def _is_zeros(path: Path) -> bool:
    """Return whether a file holds only zero bytes.

    Spills are not synced to the disk, so a crash of the machine may leave one like this.
    """
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            if chunk.strip(b"\0"):
                return False
    return True


def _read_arrow_schema(path: Path) -> Any:
    """Return the schema at the start of an Arrow file, or None for another file."""
    import pyarrow as pa  # imported late: programs that only read a manifest do not need it

    try:
        with pa.OSFile(str(path)) as file:
            if file.read(len(_ARROW_START)) != _ARROW_START:
                return None
            return pa.ipc.read_schema(file)
    except (OSError, ValueError, pa.ArrowException):
        return None


def _is_sent_digest(path: Path) -> bool:
    with open(path, "rb") as file:
        return re.fullmatch(rb"[0-9a-f]{64}", file.read(65)) is not None


def _is_rejected(path: Path) -> bool:
    """Return whether every line of a nonempty file describes a rejected record."""
    has_entry = False
    try:
        with open(path, "rb") as file:
            while line := file.readline(_LARGEST_LINE):
                entry = orjson.loads(line)
                if not (isinstance(entry, dict) and entry.keys() == _REJECTED_KEYS):
                    return False
                has_entry = True
    except (OSError, ValueError, RecursionError):
        return False
    return has_entry


def _starts_with(*keys: str) -> Callable[[Path], bool]:
    """Return a test for files with these keys in a first line of JSON."""

    def test(path: Path) -> bool:
        try:
            with open(path, "rb") as file:
                first_line = json.loads(file.readline(_LARGEST_LINE))
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(first_line, dict) and set(keys) <= first_line.keys()

    return test


# Pattern for the name of a file in a work folder -> the test for its content.
_TESTS: tuple[tuple[re.Pattern[str], Callable[[Path], bool]], ...] = (
    (re.compile(re.escape(MARKER_NAME)), is_marker),
    (re.compile(re.escape(LOCK_NAME)), _is_lock),
    (re.compile(re.escape(LEASE_NAME)), _is_lease),
    (re.compile(re.escape(COMMIT_NAME)), _is_commit),
    (re.compile(re.escape(IDENTITY_NAME)), _starts_with(IDENTITY_FIELD)),
    (re.compile(re.escape(CARD_NAME)), _is_card_file),
    (re.compile(rf"({EVAL_FOLDER}/)?{re.escape(MANIFEST_NAME)}"), has_manifest),
    (re.compile(rf"({EVAL_FOLDER}/)?{GROUP_FOLDER}/{GROUP_FILE_PATTERN}\.json"), has_group),
    (re.compile(rf"({EVAL_FOLDER}/)?{GROUP_FOLDER}/{GROUP_FILE_PATTERN}\.index"), _is_index),
    (re.compile(rf"({EVAL_FOLDER}/)?{REJECTED_FOLDER}/{GROUP_FILE_PATTERN}\.jsonl"), _is_rejected),
    (re.compile(rf"{TOKENIZER_PATTERN}/({'|'.join(TOKENIZER_FILES)})"), is_tokenizer_file),
    (re.compile(RECIPE_PATTERN), _starts_with("tokenizer", "train_on", "renames")),
    (re.compile(rf"{SPILL_PATTERN}|{HELD_OUT_PATTERN}"), _is_spill),
    (re.compile(RECEIPT_PATTERN), _starts_with(RECEIPT_FIELD)),
    (re.compile(r"rejected-[0-9a-f]{40}\.jsonl"), _is_rejected),
    (
        re.compile(r"(hashes|sizes)-[0-9a-f]{40}\.npy|duplicates-[0-9a-f]{40}-\d{5,}\.npy"),
        _is_array,
    ),
    (re.compile(rf"({EVAL_FOLDER}/)?{SHARD_FOLDER}/{SHARD_PATTERN}"), is_shard),
    (re.compile(rf"{SHARD_FOLDER}/{SHARD_PATTERN}{re.escape(SENT_SUFFIX)}"), _is_sent_digest),
)
