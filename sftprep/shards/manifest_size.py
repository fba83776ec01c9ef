"""An upper bound for a manifest's size, before the work of a build starts.

A manifest larger than LARGEST_MANIFEST could not be read again. A build that would need one is
refused at its start and not at its commit, when all the work is done.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from sftprep.config.validation import FormatName
from sftprep.errors import ConfigError, setting
from sftprep.shards.layout import LARGEST_MANIFEST
from sftprep.shards.ledger import Ledger
from sftprep.shards.manifest import InputInfo, Manifest, ShardInfo

# The largest count that is assumed. Where the inputs are numerous enough to make the manifest
# large, their counts cannot be larger than this on average.
_COUNT = 10**10 - 1
# Bytes for the fields that are known only when the manifest is made: the totals and the plan.
_UNKNOWN_BYTES = 64 * 1024

InputEntry = tuple[InputInfo, Sequence[str]]
"""An entry of the manifest without its path, and the paths of the inputs with such an entry."""


def expected_input(source: str, limit: int | None, reasons: Sequence[str] = ()) -> InputInfo:
    """Return an entry of the size of an ordinary input's, without its path.

    Args:
        source: The name of its source.
        limit: The most records that are read of its source.
        reasons: Counts by reason that many inputs will have, such as `left_out.held_out`.
    """
    names = [f.name for f in dataclasses.fields(Ledger) if f.default is not dataclasses.MISSING]
    ledger = Ledger.from_counts(dict.fromkeys([*names, *reasons], _COUNT))
    return InputInfo(
        path="",
        bytes=_COUNT,
        digest="0" * 32,
        format=max(get_args(FormatName), key=len),
        first_ordinal=_COUNT,
        lines=_COUNT,
        records=_COUNT,
        source=source,
        accounting=ledger,
        limit=limit,
    )


def manifest_sizes(
    known: Mapping[str, Any], entries: Iterable[InputEntry], shards: int = 1
) -> dict[str, int]:
    """Return the maximum number of bytes of each part of a manifest.

    Args:
        known: The fields that are known already, except for inputs and shards.
        entries: The entries of its inputs.
        shards: The number of shards.
    """
    config = known.get("config", {})
    sizes = {f"config.{name}": _encoded_bytes({"": {name: config[name]}}) for name in config}
    sizes |= {name: _encoded_bytes({name: known[name]}) for name in known if name != "config"}
    sizes |= {"inputs": 0, "sources": 0}
    for info, paths in entries:
        # Encoded once for all inputs of a kind: there may be a million of them.
        shared = dataclasses.asdict(dataclasses.replace(info, path="", source=""))
        sizes["inputs"] += len(paths) * _item_bytes(shared)
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
    """Check the size of a build's manifest against the limit of `read_manifest`.

    Args:
        known: As for `manifest_sizes`.
        entries: As for `manifest_sizes`.
        shards: The least number of shards.

    Raises:
        ConfigError: The manifest may be too large.
    """
    sizes = manifest_sizes(known, entries, shards)
    if sum(sizes.values()) > LARGEST_MANIFEST:
        raise _too_large(sum(sizes.values()), sizes)


def manifest_bytes(manifest: Manifest) -> bytes:
    """Return the bytes of a manifest.

    Raises:
        ConfigError: It is larger than `read_manifest` accepts.
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
    # The arguments are those of `Manifest.to_json`; its size is what is estimated.
    encoded = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, default=str)
    return len(encoded.encode("utf-8", "surrogatepass"))


def _item_bytes(item: object) -> int:
    """Return the additional bytes of one more item of `inputs` or `shards`."""
    return _encoded_bytes({"": [item]}) - _encoded_bytes({"": []})


def _string_bytes(text: str) -> int:
    return len(json.dumps(text, ensure_ascii=False).encode("utf-8", "surrogatepass"))


# Part of a manifest that may be large -> its description, and what makes it smaller.
_PARTS = {
    "inputs": ("the entries of the inputs", "join small input files, or make several builds"),
    "sources": (
        "the names of the sources, which the entry of each input repeats",
        "use a short name for each source of the mixture",
    ),
    "shards": (
        "the entries of the shards",
        f"raise {setting('shard_tokens')}, or make several builds",
    ),
    "chat_template": ("the chat template", f"use a shorter one with {setting('chat_template')}"),
    "config.inputs": (
        "the names of the inputs",
        "specify folders or patterns instead of files, or make several builds",
    ),
    "config.eval_input": (
        "the names of the evaluation inputs",
        "specify folders or patterns instead of files",
    ),
    "config.sources": (
        "the sources of the mixture",
        "specify folders or patterns instead of files, and shorten the entries of the sources",
    ),
}


def _too_large(size: int, sizes: Mapping[str, int]) -> ConfigError:
    """Return the error for a too large manifest, with its largest parts by size."""
    largest = sorted(sizes, key=lambda part: -sizes[part])
    # At most three parts, and none below an eighth of the largest: shortening it would not help.
    large = [part for part in largest if sizes[part] * 8 >= sizes[largest[0]]][:3]
    descriptions, remedies = [], []
    for part in large:
        name = part.removeprefix("config.")
        option = setting(name) if name != part else name
        description, remedy = _PARTS.get(part, (option, f"shorten {option}"))
        descriptions.append(f"{description} ({sizes[part] / 2**20:,.1f} MiB)")
        remedies.append(remedy)
    return ConfigError(
        f"the manifest of this build would have {size / 2**20:,.1f} MiB, and"
        f" {LARGEST_MANIFEST >> 20} MiB at most can be read; the largest parts are"
        f" {', '.join(descriptions)}",
        remedy="; ".join(dict.fromkeys(remedies)),
    )
