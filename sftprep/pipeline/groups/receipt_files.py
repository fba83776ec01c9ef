"""Files of receipts in a work folder: JSON with a checksum, so that a damaged one is not used."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import xxhash

from sftprep.core.atomic_write import write_bytes
from sftprep.core.regular_files import open_regular_file
from sftprep.pipeline.groups.evaluation_files import evaluation_to_json, parse_evaluation
from sftprep.pipeline.groups.task import EvaluationPart
from sftprep.pipeline.passes.spill import spill_path
from sftprep.shards.json_fields import FieldError
from sftprep.shards.layout import RECEIPT_FIELD, raw_rejected_name, receipt_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """The result of a group.

    Attributes:
        key: Its key, see `receipt_key`.
        group: The content of the file of the group; "" for a group of evaluation records.
        rejected: The SHA-256 of its rejected records, in hex; "" without any.
        bytes: The size of its records, decompressed.
        spills: The keys of the spills of its partitions.
        unread_columns: Of each input, the columns with content that the format does not read.
        evaluation: Its evaluation records, if there are any.
    """

    key: str
    group: str
    rejected: str
    bytes: int = 0
    spills: tuple[str, ...] = ()
    unread_columns: tuple[tuple[str, ...], ...] = ()
    evaluation: EvaluationPart | None = None

    @property
    def other_files(self) -> list[str]:
        """Return the names of the other files that it needs in the work folder."""
        names = [raw_rejected_name(self.key)] if self.rejected else []
        if self.evaluation is not None:
            keys = {part.key: None for part in self.evaluation.parts if len(part.lengths)}
            names += [spill_path(Path(), each).name for each in keys]
        return names


def write_receipt(work: Path, receipt: Receipt) -> None:
    """Write a receipt.

    Raises:
        StorageError: The file cannot be written.
    """
    values = {field.name: getattr(receipt, field.name) for field in dataclasses.fields(receipt)}
    evaluation = receipt.evaluation
    values["evaluation"] = None if evaluation is None else evaluation_to_json(evaluation)
    write_values(work / receipt_name(receipt.key), values)


def read_receipt(path: Path) -> Receipt | None:
    """Return the receipt in a file; None if it is missing or damaged."""
    values = read_values(path)
    if values is None:
        return None
    try:
        evaluation = values["evaluation"]
        return Receipt(
            key=values["key"],
            group=values["group"],
            rejected=values["rejected"],
            bytes=values["bytes"],
            spills=tuple(values["spills"]),
            unread_columns=tuple(map(tuple, values["unread_columns"])),
            evaluation=None if evaluation is None else parse_evaluation(evaluation),
        )
    except (KeyError, TypeError, ValueError, FieldError):
        return None


def write_values(path: Path, values: dict[str, Any]) -> None:
    """Write JSON values with a checksum.

    Raises:
        StorageError: The file cannot be written.
    """
    content = orjson.dumps(values)
    head = orjson.dumps({RECEIPT_FIELD: _checksum(path, content)})
    write_bytes(path, head + b"\n" + content)


def read_values(path: Path) -> dict[str, Any] | None:
    """Return the values that `write_values` wrote; None if they are missing or damaged."""
    try:
        with open_regular_file(path) as file:
            head, content = orjson.loads(file.readline()), file.read()
        if head[RECEIPT_FIELD] != _checksum(path, content):
            return None
        values = orjson.loads(content)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return values if isinstance(values, dict) else None


def _checksum(path: Path, content: bytes) -> str:
    # A file that was renamed is the receipt of other work.
    return xxhash.xxh3_128_hexdigest(path.name.encode() + content)
