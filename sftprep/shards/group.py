"""The file of a group: its inputs, its ledger and its shards.

A build consists of groups. A group is a range of the inputs, of which the packs are planned
together; its packs do not depend on other groups. The manifest names the file of each group, and
readers open it when they need one of its shards.
"""

from __future__ import annotations

import dataclasses
import json
import re
from array import array
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from sftprep.core.regular_files import read_regular_file
from sftprep.errors import ManifestError, ShardError
from sftprep.shards.json_fields import FieldError, check_text, encode_json, parse_fields
from sftprep.shards.layout import (
    KEY_PATTERN,
    LARGEST_MANIFEST,
    SHARD_FOLDER,
    group_path,
    index_path,
    rejected_path,
)
from sftprep.shards.ledger import Ledger
from sftprep.shards.schema import ORIGIN_BITS, SHARD_NAME
from sftprep.stores.cache import local_file
from sftprep.stores.folder import BuildFolder

if TYPE_CHECKING:
    PackCounts = array[int]
else:
    PackCounts = array  # before Python 3.12, it is not generic when the program runs
_KEY = re.compile(KEY_PATTERN)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_XXH3 = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive bytes of a shard, with a digest."""

    bytes: int
    xxh3: str  # 128 bits in hex


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """The entry of one shard file in the file of its group."""

    name: str  # path in the folder `shards`: that of the group and, since version 2.0, its folder
    rows: int  # packs, or sequences in layout `sequences`
    tokens: int
    trained_tokens: int  # targets of the loss, see `Ledger.trained_tokens`
    bytes: int
    sha256: str  # of the whole file, in hex
    xxh3: str = ""  # of the whole file, 128 bits in hex; before version 2.0
    # The blocks of `BLOCK_PACKS` packs, in order, and then the end of the file; together, they are
    # the whole file. Readers check these digests, which are faster; empty before version 2.0.
    blocks: tuple[Block, ...] = ()


@dataclass(frozen=True, slots=True)
class InputInfo:
    """The entry of one input file, or of the range of it that belongs to the group."""

    path: str  # or the name of data in memory
    bytes: int
    digest: str  # of the content that was read
    format: str
    lines: int
    records: int
    first_ordinal: int = 0  # before version 2.0: the number of lines in all inputs before this one
    source: str = ""  # the entry of a mixture that the input belongs to
    accounting: Ledger = field(default_factory=Ledger)  # empty before version 1.1
    limit: int | None = None  # the most records that were read of its source
    # By the name of a count, such as `warnings.double_bos`, or `dropped.too_short` of a transform:
    # the line of the first record that it counts, from 1.
    first_lines: dict[str, int] = field(default_factory=dict)
    slices: tuple[int, ...] = ()  # the number of lines in each slice; empty before version 2.0
    start: int = 0  # the first byte or row of the range; the lines are counted from there

    def followed_by(self, later: InputInfo) -> InputInfo:
        """Return the entry of this range and the next one of the same input."""
        first_lines = {name: self.lines + line for name, line in later.first_lines.items()}
        return dataclasses.replace(
            self,
            bytes=self.bytes + later.bytes,
            digest=xxhash.xxh3_128_hexdigest(f"{self.digest}{later.digest}".encode()),
            lines=self.lines + later.lines,
            records=self.records + later.records,
            accounting=Ledger.sum((self.accounting, later.accounting)),
            first_lines=first_lines | self.first_lines,
            slices=self.slices + later.slices,
        )


@dataclass(frozen=True, slots=True)
class Group:
    """The content of the file of a group."""

    key: str  # 16 hex digits of the digest of everything that determines its packs
    config_digest: str  # of the settings and recipes
    max_length: int  # tokens per pack at most
    inputs: tuple[InputInfo, ...]
    accounting: Ledger  # the sum of the ledgers of its inputs
    lengths: dict[str, Any]  # histogram of the lengths of the sequences before they were cut
    # The exact counts of lengths and positions for each source, as `lengths["exact"]` has them for
    # all sources.
    source_lengths: dict[str, Any]
    plan: dict[str, Any]  # strategy, packs, fill, seed and digest of the packing
    template: dict[str, int]  # how often each way of rendering and masking was used
    max_id: int | None  # the highest token id in its shards; None without a token
    shards: tuple[ShardInfo, ...]
    sftprep_version: str
    format_version: str
    index_digest: str = ""  # xxh3-128 of the file of its index, in hex; "" before version 2.0
    # Digest of its records in hex, which seeds the order of its packs; it depends on no setting of
    # the packing, and not on which of the records are used.
    records: str = ""
    # The columns of its shards, and their types, such as list<int32>; empty before version 2.0.
    columns: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """The number of rows of its shards: packs, or sequences."""
        return sum(shard.rows for shard in self.shards)

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def trained_tokens(self) -> int:
        """The number of targets of the loss."""
        return sum(shard.trained_tokens for shard in self.shards)

    @property
    def shard_bytes(self) -> int:
        """The size of all shards."""
        return sum(shard.bytes for shard in self.shards)

    def check(self) -> None:
        """Check what names of files are made of, apart from shards, see `GroupEntry.check`.

        Raises:
            FieldError: It is something else than a key or a digest.
        """
        check_text(_KEY, self.key, "key")
        check_text(_XXH3, self.index_digest, "index_digest")

    def to_json(self) -> bytes:
        """Return the bytes of its file: UTF-8 JSON with sorted keys."""
        return f"{encode_json(dataclasses.asdict(self))}\n".encode()

    def locate(self, origin: int) -> tuple[str, int]:
        """Return the input and the line of a record, counted from 1 in the range of the input.

        Args:
            origin: `slice << ORIGIN_BITS | line`, where the slices of all inputs are numbered from
                0, and the lines of a slice too. Before version 2.0, it is the number of lines
                before the record, in all inputs.

        Raises:
            IndexError: No record has this origin.
        """
        if self.format_version.startswith("1."):
            return self._locate_by_ordinal(origin)
        if origin < 0:
            raise IndexError(f"{origin} is not an origin")
        number, line = origin >> ORIGIN_BITS, origin & ((1 << ORIGIN_BITS) - 1)
        found = number
        for info in self.inputs:
            if 0 <= found < len(info.slices) and line < info.slices[found]:
                return info.path, sum(info.slices[:found]) + line + 1
            found -= len(info.slices)
        raise IndexError(f"no record is in line {line} of slice {number}")

    def _locate_by_ordinal(self, origin: int) -> tuple[str, int]:
        starts = [info.first_ordinal for info in self.inputs]
        # An input without lines has the same first ordinal as the next one; bisect_right skips it.
        index = bisect_right(starts, origin) - 1
        if index < 0 or not 0 <= origin - starts[index] < self.inputs[index].lines:
            raise IndexError(f"no record has the ordinal {origin}")
        return self.inputs[index].path, origin - starts[index] + 1


@dataclass(frozen=True, slots=True)
class GroupEntry:
    """The entry of a group in the manifest."""

    key: str  # 16 hex digits, see `Group.key`
    digest: str  # SHA-256 of the file of the group, in hex
    packs: PackCounts  # of each shard; of the whole group in layout `sequences`
    tokens: int
    trained_tokens: int
    bytes: int  # of all shards
    # The lines of its first input in the groups before it: a large file belongs to several groups.
    lines_before: int = 0
    rejected: str = ""  # SHA-256 of the file of its rejected records; "" without such a file

    @classmethod
    def of(
        cls, group: Group, digest: str, *, lines_before: int = 0, rejected: str = ""
    ) -> GroupEntry:
        """Return the entry of a group; the arguments are the fields that the group lacks."""
        return cls(
            key=group.key,
            digest=digest,
            packs=array("q", [shard.rows for shard in group.shards]),
            tokens=group.tokens,
            trained_tokens=group.trained_tokens,
            bytes=group.shard_bytes,
            lines_before=lines_before,
            rejected=rejected,
        )

    def check(self, place: str) -> None:
        """Check what names of files are made of, for an entry of a build since version 2.0.

        A name such as ../../etc/passwd would make readers open files outside the folder.

        Args:
            place: Its place in the manifest, for the error.

        Raises:
            FieldError: It is something else than a key or a digest.
        """
        check_text(_KEY, self.key, f"{place}.key")
        check_text(_SHA256, self.digest, f"{place}.digest")
        if self.rejected:
            check_text(_SHA256, self.rejected, f"{place}.rejected")


def files_of_group(entry: GroupEntry, group: Group) -> list[str]:
    """Return the paths of all files of a group, relative to the folder of its build.

    The shards are first, and the file of the group, which names them, is last. Before version 2.0,
    there are only shards.
    """
    names = [f"{SHARD_FOLDER}/{shard.name}" for shard in group.shards]
    if entry.rejected:
        names.append(rejected_path(entry.key, entry.rejected))
    if entry.digest:
        names.append(index_path(entry.key, group.index_digest))
        names.append(group_path(entry.key, entry.digest))
    return names


def read_group(folder: BuildFolder, key: str, digest: str, *, keep: bool = True) -> Group:
    """Read the file of a group.

    Args:
        folder: The folder of the build.
        key: The key of the group.
        digest: The SHA-256 of the file, in hex, from the manifest.
        keep: Whether to keep the group in memory, where the next call finds it.

    Raises:
        ManifestError: The file is missing or damaged, or names files outside the folder.
    """
    try:
        with local_file(folder, group_path(key, digest), digest) as path:
            try:
                status = path.stat() if keep else None
            except OSError:
                status = None
            if status is None:
                return _read_group(path, key, digest)
            identity = (status.st_ino, status.st_size, status.st_mtime_ns)
            return _cached_group(path, key, digest, identity)
    except ShardError as error:  # of the object in a store
        raise ManifestError(error.message, remedy=error.remedy) from error


# A reader in random order goes back to the same groups all the time.
@lru_cache(maxsize=64)
def _cached_group(path: Path, key: str, digest: str, _: tuple[int, ...]) -> Group:
    """Read the file of a group; the last argument identifies its content."""
    return _read_group(path, key, digest)


def _read_group(path: Path, key: str, digest: str) -> Group:
    try:
        content = read_regular_file(path, LARGEST_MANIFEST)
    except OSError as error:
        raise ManifestError(
            f"cannot read {path}, which the manifest names: {error.strerror}",
            remedy="copy the folder again, or build again",
        ) from error
    try:
        if sha256(content).hexdigest() != digest:
            raise FieldError("its content is not what was written")
        group: Group = parse_fields(Group, json.loads(content), "")
        if group.key != key:
            raise FieldError(f"its key is {group.key}")
        group.check()
    except (FieldError, ValueError, RecursionError) as error:
        raise ManifestError(
            f"{path} is damaged: {error}", remedy="remove the folder, and build again"
        ) from error
    check_shards(group.shards, path)
    return group


def check_shards(shards: Iterable[ShardInfo], path: BuildFolder) -> None:
    """Check the names and digests of shards.

    Args:
        shards: The entries of the shards.
        path: The file that lists them.

    Raises:
        ManifestError: A name would lead out of the folder, or a digest is none.
    """
    for number, shard in enumerate(shards):
        # A name such as ../../etc/passwd would make readers open files outside the folder.
        if not SHARD_NAME.fullmatch(shard.name):
            raise ManifestError(
                f"{path} lists a shard with the name {shard.name!r}",
                remedy="do not use this folder: its manifest was tampered with",
            )
        if not _SHA256.fullmatch(shard.sha256):
            raise ManifestError(
                f"{path} is damaged: shards[{number}].sha256 is {shard.sha256!a:.40}",
                remedy="remove the folder, and build again",
            )
