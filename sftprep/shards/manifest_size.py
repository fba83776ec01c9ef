"""How large the manifest of a build will be, before the work starts: what cannot be read again is
not written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from sftprep.config.validation import FormatName
from sftprep.errors import ConfigError
from sftprep.shards.layout import LARGEST_MANIFEST
from sftprep.shards.manifest import Accounting, InputInfo, Manifest, ShardInfo

_COUNT = 10**10 - 1
"""What an ordinary count has at most. The manifest of so many inputs that its size matters cannot
have larger ones on average."""
_UNKNOWN_BYTES = 64 * 1024
"""Bytes for the fields that are only known when the manifest is made: the sums and the plan."""

InputEntry = tuple[InputInfo, Sequence[str]]
"""An entry of the manifest without its path, and the paths of the inputs that have such a one."""


def expected_input(source: str, limit: int | None, reasons: Sequence[str] = ()) -> InputInfo:
    """Return an entry that is as large as that of an ordinary input, without its path.

    Args:
        source: the name of its source.
        limit: how many records of its source are read at most.
        reasons: counts by reason that many inputs will have, such as `left_out.held_out`.
    """
    names = [f.name for f in dataclasses.fields(Accounting) if f.default is not dataclasses.MISSING]
    accounting = Accounting.of(dict.fromkeys([*names, *reasons], _COUNT))
    return InputInfo(
        path="",
        bytes=_COUNT,
        digest="0" * 32,
        format=max(get_args(FormatName), key=len),
        first_ordinal=_COUNT,
        lines=_COUNT,
        records=_COUNT,
        source=source,
        accounting=accounting,
        limit=limit,
    )


def manifest_sizes(
    known: Mapping[str, Any], entries: Iterable[InputEntry], shards: int = 1
) -> dict[str, int]:
    """Return the bytes that each part of a manifest takes at most.

    Args:
        known: the fields that are known, but for inputs and shards.
        entries: those of its inputs.
        shards: how many there are.
    """
    config = known.get("config", {})
    sizes = {f"config.{name}": _encoded_bytes({"": {name: config[name]}}) for name in config}
    sizes |= {name: _encoded_bytes({name: known[name]}) for name in known if name != "config"}
    sizes |= {"inputs": 0, "sources": 0}
    for info, paths in entries:
        bare = dataclasses.asdict(dataclasses.replace(info, path="", source=""))
        sizes["inputs"] += len(paths) * _item_bytes(bare)
        sizes["inputs"] += sum(map(_string_bytes, paths))
        sizes["sources"] += len(paths) * _string_bytes(info.source)
    shard = ShardInfo(
        name=f"shard-99999-{'0' * 16}.arrow",
        rows=_COUNT,
        tokens=_COUNT,
        trained_tokens=_COUNT,
        bytes=_COUNT,
        sha256="0" * 64,
        xxh3="0" * 32,
    )
    sizes["shards"] = shards * _item_bytes(dataclasses.asdict(shard))
    return {**sizes, "others": _UNKNOWN_BYTES}


def check_manifest_size(
    known: Mapping[str, Any], entries: Iterable[InputEntry], shards: int = 1
) -> None:
    """Check that the manifest of a build will not be larger than what `read_manifest` takes.

    Args:
        known: as for `manifest_sizes`.
        entries: the same.
        shards: how many there are at least.

    Raises:
        ConfigError: it may be.
    """
    sizes = manifest_sizes(known, entries, shards)
    if sum(sizes.values()) > LARGEST_MANIFEST:
        raise _too_large(sum(sizes.values()), sizes)


def manifest_bytes(manifest: Manifest) -> bytes:
    """Return the bytes of a manifest.

    Raises:
        ConfigError: there are more of them than `read_manifest` takes.
    """
    content = manifest.to_json()
    if len(content) > LARGEST_MANIFEST:
        known = {f.name: getattr(manifest, f.name) for f in dataclasses.fields(manifest)}
        del known["inputs"], known["shards"]
        known["accounting"] = dataclasses.asdict(manifest.accounting)
        entries = [(info, [info.path]) for info in manifest.inputs]
        raise _too_large(len(content), manifest_sizes(known, entries, len(manifest.shards)))
    return content


def _encoded_bytes(value: object) -> int:
    encoded = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, default=str)
    return len(encoded.encode("utf-8", "surrogatepass"))


def _item_bytes(item: object) -> int:
    """Return what one more item of `inputs` or `shards` takes."""
    return _encoded_bytes({"": [item]}) - _encoded_bytes({"": []})


def _string_bytes(text: str) -> int:
    return len(json.dumps(text, ensure_ascii=False).encode("utf-8", "surrogatepass"))


_PARTS = {
    "inputs": ("the entries of the inputs", "join small input files, or make several builds"),
    "sources": (
        "the names of the sources, which stand in the entry of each input",
        "give each source a short name (--config, sources:)",
    ),
    "shards": ("the entries of the shards", "raise --shard-tokens, or make several builds"),
    "chat_template": ("the chat template", "give a shorter one with --chat-template"),
    "config.inputs": (
        "the names of the inputs",
        "name folders or patterns instead of files, or make several builds",
    ),
    "config.eval_input": (
        "the names of the evaluation inputs",
        "name folders or patterns instead of files",
    ),
    "config.sources": (
        "the setting sources",
        "name folders or patterns instead of files, and shorten what the sources say",
    ),
}
"""Parts of a manifest that may be large -> how they are called, and what makes them smaller."""


def _too_large(size: int, sizes: Mapping[str, int]) -> ConfigError:
    """Name the parts that make a manifest too large, the largest first."""
    largest = sorted(sizes, key=lambda part: -sizes[part])
    large = [part for part in largest if sizes[part] * 8 >= sizes[largest[0]]][:3]
    shown, remedies = [], []
    for part in large:
        setting = part.removeprefix("config.")
        option = f"--{setting.replace('_', '-')}" if setting != part else setting
        what, remedy = _PARTS.get(part, (option, f"shorten {option}"))
        shown.append(f"{what} ({sizes[part] / 2**20:,.1f} MiB)")
        remedies.append(remedy)
    return ConfigError(
        f"the manifest of this build would have {size / 2**20:,.1f} MiB, and"
        f" {LARGEST_MANIFEST >> 20} MiB at most can be read; most of it are {', '.join(shown)}",
        remedy="; ".join(dict.fromkeys(remedies)),
    )
