"""The manifest: the mark of a finished build in a folder of shards.

It is written last, and readers follow only the manifest, so they never see half of a build. It
names the groups of the build; the shards of a group are listed in the file of the group.
"""

from __future__ import annotations

import dataclasses
import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import accumulate
from typing import Any

from sftprep.config.validation import check_local_path
from sftprep.core.regular_files import read_regular_file
from sftprep.errors import ManifestError
from sftprep.shards.group import (
    Group,
    GroupEntry,
    InputInfo,
    ShardInfo,
    check_shards,
    read_group,
)
from sftprep.shards.json_fields import (
    NOT_STORED,
    FieldError,
    check_field,
    check_seal,
    compact_packs,
    encode_json,
    is_stored,
    parse_fields,
    seal,
)
from sftprep.shards.layout import (
    LARGEST_MANIFEST,
    MANIFEST_NAME,
    manifest_file,
    read_stored_manifest,
)
from sftprep.shards.ledger import Ledger
from sftprep.stores.folder import BuildFolder, StoreFolder, folder_of

FORMAT_VERSION = "2.0"
_READ_MAJORS = ("1", "2")
LAYOUTS = ("packs", "sequences")


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """A source of a build: an entry of a mixture, or an input."""

    name: str
    weight: float | None  # its share of what `mix_by` says, relative to the other sources
    records: int  # that were read
    sequences: int  # that were packed, and their tokens
    tokens: int
    trained_tokens: int
    # The share of the build in its sequences, tokens and trained tokens, by name, in percent.
    shares: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of a manifest: the origin of a build and its groups."""

    config: dict[str, Any]  # the settings that determine the bytes of the build
    config_digest: str
    # name, fingerprint, vocab_size, max_id (the highest id in the shards), eos_token_id and
    # pad_token_id
    tokenizer: dict[str, Any]
    chat_template: str | None
    encoder: dict[str, Any]  # the encoder that was used, and how it was checked
    template: dict[str, Any]  # digest of the chat template, and how it was run
    accounting: Ledger  # the sum of the ledgers of all inputs
    plan: dict[str, Any]  # strategy, packs, fill and seed of the packing
    max_length: int  # tokens per pack at most
    rows: int  # packs of all shards
    tokens: int
    trained_tokens: int
    sftprep_version: str
    # The SHA-256, in hex, of the SHA-256 of all shards in order. It identifies the packs, and
    # depends on neither the place of the build nor the names of its inputs.
    data_digest: str = ""
    groups: tuple[GroupEntry, ...] = ()
    sources: tuple[SourceInfo, ...] = ()  # empty before version 2.0
    format_version: str = FORMAT_VERSION
    # What a row of a shard is: "packs", or "sequences" whose packs are planned while reading. Then
    # the numbers of packs and tokens here are those of the settings of the build.
    layout: str = "packs"
    # Histogram of the lengths of the sequences before they were cut; empty in older builds.
    lengths: dict[str, Any] = field(default_factory=dict)
    # The evaluation build, if there is one: its folder, relative to that of this build, the name of
    # its manifest there, and the digest of the manifest.
    eval: dict[str, Any] = field(default_factory=dict)
    # `used`: the functions of the user: setting, name, digest (null if it has no stable one),
    # transform_id, and whether other builds reuse what was made with it.
    functions: dict[str, Any] = field(default_factory=dict)
    # The digest of the file that it was read from; "" if it was not read. A later version may write
    # the same manifest with more fields.
    file_digest: str = field(default="", compare=False, repr=False, metadata=NOT_STORED)
    # The folder with the files of the groups.
    folder: BuildFolder | None = field(default=None, compare=False, repr=False, metadata=NOT_STORED)
    # The only group of a build before version 2.0, whose manifest has its fields.
    single_group: Group | None = field(default=None, repr=False, metadata=NOT_STORED)

    @property
    def digest(self) -> str:
        """Return the SHA-256, in hex, of the written manifest.

        It pins every byte of the build.
        """
        return self.file_digest or sha256(self.to_json()).hexdigest()

    @property
    def num_shards(self) -> int:
        """The number of shards of all groups, whose files are read for layout `sequences` only."""
        return sum(len(self.shard_rows(number)) for number in range(len(self.groups)))

    @property
    def shard_bytes(self) -> int:
        """The size of all shards."""
        return sum(entry.bytes for entry in self.groups)

    @property
    def has_slices(self) -> bool:
        """Return whether origins name slices, as they do since version 2.0."""
        return self.single_group is None

    @property
    def inputs(self) -> tuple[InputInfo, ...]:
        """The inputs of all groups, in order; the ranges of a large file as one input.

        Raises:
            ManifestError: The file of a group is missing or damaged.
        """
        found: list[InputInfo] = []
        for group in self.read_groups():
            for info in group.inputs:
                if info.start and found:
                    found[-1] = found[-1].followed_by(info)
                else:
                    found.append(info)
        return tuple(found)

    @property
    def shards(self) -> tuple[ShardInfo, ...]:
        """The shards of all groups, in order.

        Raises:
            ManifestError: The file of a group is missing or damaged.
        """
        return tuple(shard for group in self.read_groups() for shard in group.shards)

    def shard_rows(self, number: int) -> Sequence[int]:
        """Return the rows of each shard of a group, by the number of the group.

        Raises:
            ManifestError: In layout `sequences`, the file of the group is missing or damaged.
        """
        if self.layout == "sequences":
            return [info.rows for info in self.read_group(number).shards]
        return self.groups[number].packs

    def read_group(self, number: int, *, keep: bool = True) -> Group:
        """Return a group, from its file.

        Args:
            number: The number of the group, from 0.
            keep: Whether to keep it in memory for the next call.

        Raises:
            ManifestError: The file is missing or damaged.
        """
        if self.single_group is not None:
            return self.single_group
        assert self.folder is not None, "this manifest was not read from a build"
        entry = self.groups[number]
        return read_group(self.folder, entry.key, entry.digest, keep=keep)

    def read_groups(self) -> Iterator[Group]:
        """Yield the groups in order, read one after the other."""
        keep = len(self.groups) <= 8  # many would only replace those that a reader goes back to
        return (self.read_group(number, keep=keep) for number in range(len(self.groups)))

    def to_json(self) -> bytes:
        """Return the bytes of the manifest: UTF-8 JSON with sorted keys, and a checksum at its end.

        They are the same everywhere.
        """
        values = dataclasses.asdict(dataclasses.replace(self, folder=None, single_group=None))
        for declared in dataclasses.fields(self):
            if not is_stored(declared):
                del values[declared.name]
        for group in values["groups"]:
            group["packs"] = list(group["packs"])
        return seal(encode_json(values).encode())

    def locate_warning(self, kind: str) -> tuple[str, int] | None:
        """Return the file and 1-based line of the first record with a warning.

        Return None if it is not known.
        """
        return self.locate_first(f"warnings.{kind}")

    def locate_first(self, count: str) -> tuple[str, int] | None:
        """Return the file and 1-based line of the first record of a count, by its name.

        Return None if it is not known.
        """
        for entry, group in zip(self.groups, self.read_groups(), strict=True):
            for info in group.inputs:
                line = info.first_lines.get(count)
                if line is not None:
                    return info.path, line + (entry.lines_before if info.start else 0)
        return None

    def locate(self, origin: int, pack: int = 0) -> tuple[str, int]:
        """Return the file and the 1-based line of a record.

        Args:
            origin: The origin of the record, see `Group.locate`.
            pack: The index of a pack with the record: each group numbers its slices.

        Raises:
            IndexError: No record has this origin.
        """
        number = bisect_right([*accumulate(sum(entry.packs) for entry in self.groups)], pack)
        if not pack >= 0 or number == len(self.groups):
            raise IndexError(f"pack {pack} of {self.rows}")
        return self.locate_in_group(origin, number)

    def locate_in_group(self, origin: int, number: int) -> tuple[str, int]:
        """Return the file and the 1-based line of a record in the group of a number.

        Raises:
            IndexError: No record has this origin.
        """
        group = self.read_group(number)
        path, line = group.locate(origin)
        first = group.inputs[0]
        is_continued = first.start and path == first.path
        return path, line + (self.groups[number].lines_before if is_continued else 0)


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Read the manifest of a build.

    Args:
        folder: The output folder of the build.

    Raises:
        ManifestError: The folder has no manifest, or the manifest is damaged, names files outside
            the folder, or was written in a newer version of the format.
    """
    root = folder_of(folder)
    if isinstance(root, StoreFolder):
        name, content = read_stored_manifest(root)
        return parse_manifest(content, root, name)
    if not root.exists():
        check_local_path(os.fspath(folder), "the folder")
    path = manifest_file(root)
    try:
        content = read_regular_file(path, LARGEST_MANIFEST)
    except (FileNotFoundError, NotADirectoryError) as error:
        problem = (
            "is not a finished build: it has no manifest.json"
            if root.is_dir()
            else "does not exist"
            if not root.exists()
            else "is not a folder"
        )
        raise ManifestError(
            f"{root} {problem}", remedy="specify the output folder of a finished `sftprep build`"
        ) from error
    except OSError as error:
        raise ManifestError(
            f"cannot read {path}: {error.strerror}",
            remedy="check that it is a regular file, and check its permissions",
        ) from error
    return parse_manifest(content, root, path.name)


def parse_manifest(content: bytes, folder: BuildFolder, name: str = MANIFEST_NAME) -> Manifest:
    """Return the manifest of a build from the bytes of its file.

    Args:
        content: The bytes.
        folder: The folder of the build.
        name: The name of the file.

    Raises:
        ManifestError: As for `read_manifest`.
    """
    path = folder / name
    try:
        if len(content) > LARGEST_MANIFEST:
            raise ManifestError(
                f"{path} is larger than {LARGEST_MANIFEST >> 20} MiB, so sftprep did not write it",
                remedy="run the build again",
            )
        manifest = _parse_manifest(content, path)
    except (ValueError, RecursionError) as error:
        problem = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ManifestError(
            f"{path} is damaged: {problem}", remedy="remove the folder, and build again"
        ) from error
    # The training build names the manifest of its evaluation build by the digest of the content.
    file_digest = sha256(content).hexdigest()
    if name not in (MANIFEST_NAME, f"manifest-{file_digest[:16]}.json"):
        raise ManifestError(
            f"{path} is damaged: its content is not what was written",
            remedy="remove the folder, and build again",
        )
    return dataclasses.replace(manifest, file_digest=file_digest, folder=folder)


def _parse_manifest(content: bytes, path: BuildFolder) -> Manifest:
    """Validate the content of a manifest, since readers rely on every field.

    Raises:
        ValueError: It is not JSON, or has no version.
        RecursionError: It is nested too deeply.
        ManifestError: It has another version, or a field has another type.
    """
    values = json.loads(content, object_hook=compact_packs)
    version = str(values.get("format_version", "")) if isinstance(values, dict) else ""
    major = version.partition(".")[0]
    if not major.isdigit():
        raise ValueError("it has no format version")
    if major not in _READ_MAJORS:
        raise ManifestError(
            f"{path} has format version {version}; this sftprep reads {FORMAT_VERSION}",
            remedy="update sftprep",
        )
    try:
        if major != "1":
            check_seal(content)
            manifest: Manifest = parse_fields(Manifest, values, "")
        else:
            manifest = _parse_version_1(values, path)
        for name, (kind, required) in _TOKENIZER_FIELDS.items():
            if required or name in manifest.tokenizer:
                check_field(kind, manifest.tokenizer.get(name), f"tokenizer.{name}")
        if manifest.tokenizer.get("max_id", -1) != -1:  # -1 in a build without a token
            check_field(int, manifest.tokenizer["max_id"], "tokenizer.max_id")
        if manifest.layout not in LAYOUTS:
            problem = f"{path} has the layout {manifest.layout!a:.40}; this sftprep reads"
            raise ManifestError(f"{problem} {' and '.join(LAYOUTS)}", remedy="update sftprep")
        check_field(int, manifest.plan.get("cuts", 0), "plan.cuts")
        if manifest.eval:
            check_field(str, manifest.eval.get("folder"), "eval.folder")
            check_field(str, manifest.eval.get("digest"), "eval.digest")
        for number, entry in enumerate(manifest.groups):
            if manifest.has_slices:
                entry.check(f"groups[{number}]")
    except FieldError as error:
        raise ManifestError(
            f"{path} is damaged: {error}", remedy="remove the folder, and build again"
        ) from error
    return manifest


def _parse_version_1(values: dict[str, Any], path: BuildFolder) -> Manifest:
    """Return a manifest of version 1, which lists all inputs and shards, as one of one group."""
    of_group = {"template": {}, "key": "", "max_id": 0, "lengths": {}, "source_lengths": {}} | {
        name: values[name]
        for name in ("inputs", "shards", "accounting", "lengths", "plan", "max_length")
        if name in values
    }
    versions = ("config_digest", "sftprep_version", "format_version")
    of_group |= {name: values[name] for name in versions if name in values}
    group: Group = parse_fields(Group, of_group, "")
    check_shards(group.shards, path)
    digests = (bytes.fromhex(shard.sha256) for shard in group.shards)
    manifest: Manifest = parse_fields(Manifest, {**values, "groups": []}, "")
    return dataclasses.replace(
        manifest,
        groups=(GroupEntry.of(group, ""),),
        single_group=group,
        data_digest=sha256(b"".join(digests)).hexdigest(),
    )


# Field of `tokenizer` that readers use -> its type, and whether it is required.
_TOKENIZER_FIELDS = {
    "name": (str, True),
    "fingerprint": (str, True),
    "vocab_size": (int, False),
    "eos_token_id": (int | None, False),
    "pad_token_id": (int | None, False),
}
