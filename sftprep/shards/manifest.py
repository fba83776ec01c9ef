"""The manifest: the mark of a finished build in a folder of shards.

It is written last, and readers follow only the manifest, so they never see half of a build.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from sftprep.config.validation import check_local_path
from sftprep.core.regular_files import read_regular_file
from sftprep.errors import ManifestError
from sftprep.shards.layout import LARGEST_MANIFEST, MANIFEST_NAME, manifest_file
from sftprep.shards.ledger import Ledger
from sftprep.shards.schema import ORIGIN_BITS, SHARD_NAME

FORMAT_VERSION = "2.0"
_READ_MAJORS = ("1", "2")


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """The entry of one shard file in the manifest."""

    name: str  # file name in the folder `shards`
    rows: int  # packs
    tokens: int
    trained_tokens: int  # targets of the loss, see `Ledger.trained_tokens`
    bytes: int
    sha256: str  # of the whole file, in hex
    xxh3: str  # of the whole file, 128 bits in hex; faster, so readers check this one


@dataclass(frozen=True, slots=True)
class InputInfo:
    """The entry of one input file, or of data in memory, in the manifest."""

    path: str
    bytes: int
    digest: str  # of the content that was read
    format: str
    first_ordinal: int  # the number of lines in all inputs before this one
    lines: int
    records: int
    source: str = ""  # the entry of a mixture that the input belongs to
    accounting: Ledger = field(default_factory=Ledger)  # empty before version 1.1
    limit: int | None = None  # the most records that were read of its source
    # By the name of a count, such as `warnings.double_bos`, or `dropped.too_short` of a transform:
    # the line of the first record that it counts, from 1.
    first_lines: dict[str, int] = field(default_factory=dict)
    slices: tuple[int, ...] = ()  # the number of lines in each slice; empty before version 2.0


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of a manifest: the origin of a build and its files."""

    config: dict[str, Any]  # the settings that determine the bytes of the build
    config_digest: str
    # name, fingerprint, vocab_size, max_id (the highest id in the shards), eos_token_id and
    # pad_token_id
    tokenizer: dict[str, Any]
    chat_template: str | None
    encoder: dict[str, Any]  # the encoder that was used, and how it was checked
    template: dict[str, Any]  # digest of the chat template, and how it was run
    inputs: tuple[InputInfo, ...]
    accounting: Ledger  # the sum of the ledgers of all inputs
    plan: dict[str, Any]  # strategy, packs, fill, seed and digest of the packing
    max_length: int  # tokens per pack at most
    rows: int  # packs of all shards
    tokens: int
    trained_tokens: int
    shards: tuple[ShardInfo, ...]
    sftprep_version: str
    format_version: str = FORMAT_VERSION
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
    file_digest: str = field(default="", compare=False, repr=False)

    @property
    def digest(self) -> str:
        """Return the SHA-256, in hex, of the written manifest.

        It pins every byte of the build.
        """
        return self.file_digest or sha256(self.to_json()).hexdigest()

    @property
    def data_digest(self) -> str:
        """Return the SHA-256, in hex, of the SHA-256 of all shards in order.

        It identifies the packs, and depends on neither the place of the build nor the names of its
        inputs.
        """
        digests = (bytes.fromhex(shard.sha256) for shard in self.shards)
        return sha256(b"".join(digests)).hexdigest()

    def to_json(self) -> bytes:
        """Return the bytes of the manifest: UTF-8 JSON with sorted keys.

        They are the same everywhere.
        """
        values = dataclasses.asdict(self)
        del values["file_digest"]
        values["data_digest"] = self.data_digest
        text = json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False)
        return f"{text}\n".encode()

    @property
    def has_slices(self) -> bool:
        """Return whether origins name slices, as they do since version 2.0."""
        return not self.format_version.startswith("1.")

    def locate_warning(self, kind: str) -> tuple[str, int] | None:
        """Return the file and 1-based line of the first record with a warning.

        Return None if it is not known.
        """
        return self.locate_first(f"warnings.{kind}")

    def locate_first(self, count: str) -> tuple[str, int] | None:
        """Return the file and 1-based line of the first record of a count, by its name.

        Return None if it is not known.
        """
        for info in self.inputs:
            line = info.first_lines.get(count)
            if line is not None:
                return info.path, line
        return None

    def locate(self, origin: int) -> tuple[str, int]:
        """Return the file and the 1-based line of a record.

        Args:
            origin: The origin of the record: `slice << ORIGIN_BITS | line`, where the slices of all
                inputs are numbered from 0, and the lines of a slice too. Before version 2.0, it is
                the number of lines before the record, in all inputs.

        Raises:
            IndexError: No record has this origin.
        """
        if self.has_slices:
            return self._locate_in_slice(origin >> ORIGIN_BITS, origin & ((1 << ORIGIN_BITS) - 1))
        starts = [info.first_ordinal for info in self.inputs]
        # An input without lines has the same first ordinal as the next one; bisect_right skips it.
        index = bisect_right(starts, origin) - 1
        if index < 0 or not 0 <= origin - starts[index] < self.inputs[index].lines:
            raise IndexError(f"no record has the ordinal {origin}")
        return self.inputs[index].path, origin - starts[index] + 1

    def _locate_in_slice(self, number: int, line: int) -> tuple[str, int]:
        found = number
        for info in self.inputs:
            if 0 <= found < len(info.slices) and line < info.slices[found]:
                return info.path, sum(info.slices[:found]) + line + 1
            found -= len(info.slices)
        raise IndexError(f"no record is in line {line} of slice {number}")


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Read the manifest of a build.

    Args:
        folder: The output folder of the build.

    Raises:
        ManifestError: The folder has no manifest, or the manifest is damaged, names files outside
            the folder, or was written in a newer version of the format.
    """
    root = Path(folder)
    if not root.exists():
        check_local_path(os.fspath(folder), "the folder")
    path = manifest_file(root)
    try:
        content = read_regular_file(path, LARGEST_MANIFEST)
        if len(content) > LARGEST_MANIFEST:
            raise ManifestError(
                f"{path} is larger than {LARGEST_MANIFEST >> 20} MiB, so sftprep did not write it",
                remedy="run the build again",
            )
        values = json.loads(content)
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
    except (ValueError, RecursionError) as error:
        problem = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ManifestError(
            f"{path} is damaged: {problem}", remedy="remove the folder, and build again"
        ) from error
    # The training build names the manifest of its evaluation build by the digest of the content.
    file_digest = sha256(content).hexdigest()
    if path.name not in (MANIFEST_NAME, f"manifest-{file_digest[:16]}.json"):
        raise ManifestError(
            f"{path} is damaged: its content is not what was written",
            remedy="remove the folder, and build again",
        )
    return dataclasses.replace(_parse_manifest(values, path), file_digest=file_digest)


def _parse_manifest(values: Any, path: Path) -> Manifest:
    """Validate the JSON values of a manifest, since readers rely on every field."""
    version = str(values.get("format_version", "")) if isinstance(values, dict) else ""
    major = version.partition(".")[0]
    if major not in _READ_MAJORS:
        raise ManifestError(
            f"{path} has format version {version or 'none'}; this sftprep reads {FORMAT_VERSION}",
            remedy="update sftprep" if major.isdigit() else "remove the folder, and build again",
        )
    try:
        manifest: Manifest = _parse(Manifest, values, "")
        for name, (kind, required) in _TOKENIZER_FIELDS.items():
            if required or name in manifest.tokenizer:
                _check(kind, manifest.tokenizer.get(name), f"tokenizer.{name}")
        if manifest.tokenizer.get("max_id", -1) != -1:  # -1 in a build without a token
            _check(int, manifest.tokenizer["max_id"], "tokenizer.max_id")
        _check(int, manifest.plan.get("cuts", 0), "plan.cuts")
        if manifest.eval:
            _check(str, manifest.eval.get("folder"), "eval.folder")
            _check(str, manifest.eval.get("digest"), "eval.digest")
        for number, shard in enumerate(manifest.shards):
            if not _SHA256.fullmatch(shard.sha256):
                raise _FieldError(f"shards[{number}].sha256 is {_shorten(shard.sha256)}")
        if values.get("data_digest", manifest.data_digest) != manifest.data_digest:
            raise _FieldError("data_digest is not that of its shards")
    except _FieldError as error:
        raise ManifestError(
            f"{path} is damaged: {error}", remedy="remove the folder, and build again"
        ) from error
    for shard in manifest.shards:
        # A name such as ../../etc/passwd would make readers open files outside the folder.
        if not SHARD_NAME.fullmatch(shard.name):
            raise ManifestError(
                f"{path} lists a shard with the name {shard.name!r}",
                remedy="do not use this folder: its manifest was tampered with",
            )
    return manifest


class _FieldError(Exception):
    """A missing field of a manifest, or one with another type."""


def _parse(kind: Any, values: Any, prefix: str) -> Any:
    """Return a dataclass with the checked values of a JSON object.

    Args:
        kind: A dataclass of this module.
        values: The value in the manifest.
        prefix: What precedes the names of its fields in an error, such as `inputs[0].`.

    Raises:
        _FieldError: A field is missing, or has another type.
    """
    if not isinstance(values, dict):
        raise _FieldError(f"{prefix.rstrip('.') or 'it'} is {_shorten(values)}, not an object")
    types = _types_of_fields(kind)
    parsed = {}
    # Fields of `values` that are unknown here are ignored: a later minor version may add some.
    for declared in dataclasses.fields(kind):
        name = declared.name
        if name in values:
            parsed[name] = _parse_field(types[name], values[name], prefix + name)
        elif declared.default is declared.default_factory is dataclasses.MISSING:
            raise _FieldError(f"{prefix}{name} is missing")
    return kind(**parsed)


def _parse_field(kind: Any, value: Any, name: str) -> Any:
    if kind is Ledger:
        return _parse(Ledger, value, f"{name}.")
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise _FieldError(f"{name} is {_shorten(value)}, not a list")
        item_kind = get_args(kind)[0]
        if item_kind is int:
            return tuple(_check(int, item, f"{name}[{k}]") for k, item in enumerate(value))
        return tuple(_parse(item_kind, item, f"{name}[{k}].") for k, item in enumerate(value))
    return _check(kind, value, name)


def _check(kind: Any, value: Any, name: str) -> Any:
    """Return a value of the type `kind`, else raise _FieldError."""
    description, has_type = _TYPES[kind]
    if not has_type(value):
        raise _FieldError(f"{name} is {_shorten(value)}, not {description}")
    return value


def _shorten(value: Any) -> str:
    return "an object" if isinstance(value, dict) else f"{value!a:.40}"


def _is_count(value: Any) -> bool:
    # `type` and not isinstance: True is an int. Readers hold counts in int64.
    return type(value) is int and 0 <= value < 1 << 63


def _is_string(value: Any) -> bool:
    """Return whether a value is a string, encodable in UTF-8.

    Half a surrogate pair is not encodable.
    """
    return isinstance(value, str) and (value.isascii() or not _SURROGATE.search(value))


def _are_counts(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_string(k) and _is_count(n) for k, n in value.items())


def _is_json(value: Any, levels: int = 32) -> bool:
    """Return whether a JSON value can be written again.

    It must not be nested too deeply, and must be valid UTF-8.
    """
    if isinstance(value, dict):
        return levels > 0 and all(
            _is_string(key) and _is_json(item, levels - 1) for key, item in value.items()
        )
    if isinstance(value, list):
        return levels > 0 and all(_is_json(item, levels - 1) for item in value)
    return not isinstance(value, str) or _is_string(value)


_types_of_fields = lru_cache(get_type_hints)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SURROGATE = re.compile("[\ud800-\udfff]")
# Declared type of a field -> its description, and the test for a JSON value of this type.
_TYPES: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    str: ("text", _is_string),
    int: ("a whole number from 0 to 2^63 - 1", _is_count),
    str | None: ("text or null", lambda value: value is None or _is_string(value)),
    int | None: ("a whole number or null", lambda value: value is None or _is_count(value)),
    dict[str, int]: ("an object of whole numbers from 0 to 2^63 - 1", _are_counts),
    dict[str, Any]: (
        "an object of valid strings that is not nested too deeply",
        lambda value: isinstance(value, dict) and _is_json(value),
    ),
}
# Field of `tokenizer` that readers use -> its type, and whether it is required.
_TOKENIZER_FIELDS = {
    "name": (str, True),
    "fingerprint": (str, True),
    "vocab_size": (int, False),
    "eos_token_id": (int | None, False),
    "pad_token_id": (int | None, False),
}
