"""The manifest: the one file that makes a folder of shards a build. It is written last, and readers
follow only it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from sftprep.config.validation import check_local_path
from sftprep.core.regular_files import read_regular_file
from sftprep.errors import ManifestError
from sftprep.shards.layout import LARGEST_MANIFEST, MANIFEST_NAME
from sftprep.shards.schema import SHARD_NAME

FORMAT_VERSION = "1.1"


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One shard file. sha256 and xxh3 (128 bits) are of the whole file."""

    name: str
    rows: int
    tokens: int
    trained_tokens: int
    bytes: int
    sha256: str
    xxh3: str


@dataclass(frozen=True, slots=True)
class Accounting:
    """Where every row and every token went.

    lines = blank + records; records + sum(extra) = sequences + sum(rejected) + sum(dropped) +
    sum(left_out); tokens_in + sum(tokens_extra) = tokens + tokens_truncated + sum(tokens_dropped) +
    sum(tokens_left_out). extra: sequences beyond one a record, by what made them: split, repeated,
    ...; left_out: sequences that are fine and not in this build: held_out for the evaluation,
    in_training, not_sampled by the weights of a mixture. trained_tokens counts targets: the first
    token of a sequence is never one, for nothing predicts it.
    """

    lines: int = 0
    blank: int = 0
    records: int = 0
    sequences: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    extra: dict[str, int] = field(default_factory=dict)
    truncated: int = 0
    tokens_in: int = 0
    tokens: int = 0
    tokens_truncated: int = 0
    tokens_dropped: dict[str, int] = field(default_factory=dict)
    tokens_left_out: dict[str, int] = field(default_factory=dict)
    tokens_extra: dict[str, int] = field(default_factory=dict)
    trained_tokens: int = 0
    warnings: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, counts: Mapping[str, int]) -> Accounting:
        """From flat counts, in which `rejected.bad_json` is an entry of `rejected`; other names are
        left alone."""
        groups: dict[str, dict[str, int] | None] = {
            f.name: {} if f.default is dataclasses.MISSING else None
            for f in dataclasses.fields(cls)
        }
        values: dict[str, Any] = {
            name: counts.get(name, 0) if group is None else group for name, group in groups.items()
        }
        for name, number in sorted(counts.items()):
            group, dot, reason = name.partition(".")
            if dot and isinstance(values.get(group), dict):
                values[group][reason] = number
        return cls(**values)

    def counts(self) -> Counter[str]:
        """Flat counts, for `of` and for sums."""
        flat: Counter[str] = Counter()
        for name, value in dataclasses.asdict(self).items():
            flat.update(
                {f"{name}.{reason}": n for reason, n in value.items()}
                if isinstance(value, dict)
                else {name: value}
            )
        return flat

    def check(self) -> list[str]:
        """The sums that do not hold, in words; empty where all do."""
        rejected, dropped, left_out, extra = (
            sum(g.values()) for g in (self.rejected, self.dropped, self.left_out, self.extra)
        )
        lost, left, more = (
            sum(g.values()) for g in (self.tokens_dropped, self.tokens_left_out, self.tokens_extra)
        )
        sums = {
            f"lines ({self.lines}) = blank ({self.blank}) + records ({self.records})": (
                self.blank + self.records == self.lines
            ),
            f"records ({self.records}) + extra ({extra}) = sequences ({self.sequences}) "
            f"+ rejected ({rejected}) + dropped ({dropped}) + left out ({left_out})": (
                self.sequences + rejected + dropped + left_out == self.records + extra
            ),
            f"tokens in ({self.tokens_in}) + extra ({more}) = packed ({self.tokens}) "
            f"+ truncated ({self.tokens_truncated}) + dropped ({lost}) + left out ({left})": (
                self.tokens + self.tokens_truncated + lost + left == self.tokens_in + more
            ),
        }
        return [text for text, holds in sums.items() if not holds]


@dataclass(frozen=True, slots=True)
class InputInfo:
    """One input file, or data from memory. Its lines have the ordinals first_ordinal ..
    first_ordinal + lines - 1.

    source: the entry of a mixture that it belongs to; accounting: where its rows and tokens went
    (empty before 1.1); limit: how many records of its source were read at most.
    """

    path: str
    bytes: int
    digest: str
    format: str
    first_ordinal: int
    lines: int
    records: int
    source: str = ""
    accounting: Accounting = field(default_factory=Accounting)
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a build is. `tokenizer` holds name, fingerprint, vocab_size, max_id, eos_token_id and
    pad_token_id.

    eval: folder (below this build's) and digest of the evaluation build that belongs to it; empty
    where there is none.
    """

    config: dict[str, Any]
    config_digest: str
    tokenizer: dict[str, Any]
    chat_template: str | None
    encoder: dict[str, Any]
    template: dict[str, Any]
    inputs: tuple[InputInfo, ...]
    accounting: Accounting
    plan: dict[str, Any]
    max_length: int
    rows: int
    tokens: int
    trained_tokens: int
    shards: tuple[ShardInfo, ...]
    sftprep_version: str
    format_version: str = FORMAT_VERSION
    eval: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of the manifest as it is written: it pins every byte of the build."""
        return sha256(self.to_json()).hexdigest()

    def to_json(self) -> bytes:
        """The manifest's bytes: UTF-8 JSON, keys sorted, the same wherever the build ran."""
        return (
            json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True, ensure_ascii=False)
            + "\n"
        ).encode("utf-8")

    def locate(self, origin: int) -> tuple[str, int]:
        """File and line (from 1) of the record with this ordinal. Raises IndexError where there is
        none."""
        starts = [info.first_ordinal for info in self.inputs]
        at = bisect_right(starts, origin) - 1
        # An input without lines shares its first ordinal with the next one; bisect_right has then
        # gone past it already.
        if at < 0 or not 0 <= origin - starts[at] < self.inputs[at].lines:
            raise IndexError(f"no record has the ordinal {origin}")
        return self.inputs[at].path, origin - starts[at] + 1


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Read the manifest of a build.

    Raises ManifestError where there is none, where it is damaged, names files outside the folder,
    or was written by a newer version of the format.
    """
    root = Path(folder)
    if not root.exists():
        check_local_path(os.fspath(folder), "the folder")
    path = root / MANIFEST_NAME
    try:
        content = read_regular_file(path, LARGEST_MANIFEST)
        if len(content) > LARGEST_MANIFEST:
            raise ManifestError(
                f"{path} is larger than {LARGEST_MANIFEST >> 20} MiB",
                remedy="build again: this is no manifest of ours",
            )
        raw = json.loads(content)
    except (FileNotFoundError, NotADirectoryError) as error:
        what = (
            "is no finished build: it has no manifest.json"
            if root.is_dir()
            else "does not exist"
            if not root.exists()
            else "is no folder"
        )
        raise ManifestError(
            f"{root} {what}", remedy="give the --output folder of a finished `sftprep build`"
        ) from error
    except OSError as error:
        raise ManifestError(
            f"cannot read {path}: {error.strerror}",
            remedy="check that it is a file, and its permissions",
        ) from error
    except (ValueError, RecursionError) as error:
        what = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ManifestError(
            f"{path} is damaged: {what}", remedy="remove the folder, and build again"
        ) from error
    return _from_raw(raw, path)


def _from_raw(raw: Any, path: Path) -> Manifest:
    version = str(raw.get("format_version", "")) if isinstance(raw, dict) else ""
    major = version.partition(".")[0]
    if major != FORMAT_VERSION.partition(".")[0]:
        raise ManifestError(
            f"{path} has format version {version or 'none'}; this sftprep reads {FORMAT_VERSION}",
            remedy="update sftprep" if major.isdigit() else "remove the folder, and build again",
        )
    try:
        manifest: Manifest = _parse(Manifest, raw, "")
        for name, (kind, required) in _TOKENIZER_FIELDS.items():
            if required or name in manifest.tokenizer:
                _check(kind, manifest.tokenizer.get(name), f"tokenizer.{name}")
        if manifest.tokenizer.get("max_id", -1) != -1:  # of a build without a token
            _check(int, manifest.tokenizer["max_id"], "tokenizer.max_id")
        _check(int, manifest.plan.get("cuts", 0), "plan.cuts")
        if manifest.eval:
            _check(str, manifest.eval.get("folder"), "eval.folder")
            _check(str, manifest.eval.get("digest"), "eval.digest")
    except _FieldError as error:
        raise ManifestError(
            f"{path} is damaged: {error}", remedy="remove the folder, and build again"
        ) from error
    for shard in manifest.shards:
        if not SHARD_NAME.fullmatch(shard.name):
            raise ManifestError(
                f"{path} lists a shard with the name {shard.name!r}",
                remedy="do not use this folder: its manifest was tampered with",
            )
    return manifest


class _FieldError(Exception):
    """A field that is missing, or of another type."""


def _parse(kind: Any, values: Any, place: str) -> Any:
    """Make a dataclass of a JSON object whose fields have the types that it declares.

    Args:
        kind: a dataclass of this module.
        values: what stands in the manifest.
        place: the path of its fields, as `inputs[0].`; empty at the top.

    Raises:
        _FieldError: a field is missing or of another type.
    """
    if not isinstance(values, dict):
        raise _FieldError(f"{place.rstrip('.') or 'it'} is {_shown(values)}, not an object")
    types, made = _types_of(kind), {}
    # A later minor version may add fields; what this version does not know it leaves alone.
    for each in dataclasses.fields(kind):
        name = each.name
        if name in values:
            made[name] = _parse_field(types[name], values[name], place + name)
        elif each.default is each.default_factory is dataclasses.MISSING:
            raise _FieldError(f"{place}{name} is missing")
    return kind(**made)


def _parse_field(wanted: Any, value: Any, place: str) -> Any:
    if wanted is Accounting:
        return _parse(Accounting, value, f"{place}.")
    if get_origin(wanted) is tuple:
        if not isinstance(value, list):
            raise _FieldError(f"{place} is {_shown(value)}, not a list")
        kind = get_args(wanted)[0]
        return tuple(_parse(kind, item, f"{place}[{k}].") for k, item in enumerate(value))
    return _check(wanted, value, place)


def _check(wanted: Any, value: Any, place: str) -> Any:
    """Return a value that is of a type. Raises _FieldError."""
    words, is_right = _TYPES[wanted]
    if not is_right(value):
        raise _FieldError(f"{place} is {_shown(value)}, not {words}")
    return value


def _shown(value: Any) -> str:
    return "an object" if isinstance(value, dict) else f"{value!a:.40}"


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_text(value: Any) -> bool:
    """Whether a value is a string that can be written as UTF-8: half a surrogate pair cannot."""
    return isinstance(value, str) and (value.isascii() or not _SURROGATE.search(value))


def _are_counts(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_text(k) and _is_count(n) for k, n in value.items())


def _is_json(value: Any, levels: int = 32) -> bool:
    """Whether a JSON value can be written again: it is not nested too deeply, and all is text."""
    if isinstance(value, dict):
        return levels > 0 and all(
            _is_text(key) and _is_json(item, levels - 1) for key, item in value.items()
        )
    if isinstance(value, list):
        return levels > 0 and all(_is_json(item, levels - 1) for item in value)
    return not isinstance(value, str) or _is_text(value)


_types_of = lru_cache(get_type_hints)
_SURROGATE = re.compile("[\ud800-\udfff]")
_TYPES: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    str: ("text", _is_text),
    int: ("a whole number from 0 to 2^63 - 1", _is_count),
    str | None: ("text or null", lambda value: value is None or _is_text(value)),
    int | None: ("a whole number or null", lambda value: value is None or _is_count(value)),
    dict[str, int]: ("an object of whole numbers from 0 to 2^63 - 1", _are_counts),
    dict[str, Any]: (
        "an object that can be read",
        lambda value: isinstance(value, dict) and _is_json(value),
    ),
}
"""Declared type of a field -> the type in words, and whether a JSON value is of it."""
_TOKENIZER_FIELDS = {
    "name": (str, True),
    "fingerprint": (str, True),
    "vocab_size": (int, False),
    "eos_token_id": (int | None, False),
    "pad_token_id": (int | None, False),
}
"""Field of `tokenizer` that readers use -> its type, and whether it must be there."""
