"""Upper bounds for the sizes of a manifest and of the file of a group.

A file larger than LARGEST_MANIFEST could not be read again. A build that would need one is refused
before the work whose result it could not name.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from sftprep.errors import ConfigError, setting
from sftprep.shards.group import Block, GroupEntry, InputInfo, PackCounts, ShardInfo
from sftprep.shards.json_fields import encode_json
from sftprep.shards.layout import LARGEST_MANIFEST
from sftprep.shards.manifest import Manifest

# The largest count that is assumed: that of a group cannot be larger.
_COUNT = 10**13 - 1
# Bytes for the fields that are known only when the file is made: the totals, the plan, and the
# counts of tokens by bins of lengths and of positions.
_UNKNOWN_BYTES = 128 * 1024
MOST_EXACT_LENGTHS = 1 << 17
"""The longest sequence whose exact length is counted in a manifest."""
POSITION_BIN = 64
"""The number of positions whose trained tokens are counted together in a manifest."""
_BYTES_PER_LENGTH = 32  # a length and its count, each on a line


def manifest_sizes(known: Mapping[str, Any], groups: int = 1, shards: int = 1) -> dict[str, int]:
    """Return the maximum number of bytes of each part of a manifest.

    Args:
        known: The fields that are known already, except for groups.
        groups: The number of groups.
        shards: The number of shards.
    """
    config = known.get("config", {})
    sizes = {f"config.{name}": _encoded_bytes({"": {name: config[name]}}) for name in config}
    sizes |= {name: _encoded_bytes({name: known[name]}) for name in known if name != "config"}
    counts = (_COUNT,) * 4
    entry = GroupEntry("0" * 16, "0" * 64, PackCounts("q"), *counts, "0" * 64)
    sizes["groups"] = groups * _item_bytes({**dataclasses.asdict(entry), "packs": []})
    sizes["shards"] = shards * _item_bytes(2**31)
    sizes["lengths"] = _BYTES_PER_LENGTH * min(config.get("max_length") or 0, MOST_EXACT_LENGTHS)
    return {**sizes, "others": _UNKNOWN_BYTES}


def group_sizes(
    inputs: Sequence[InputInfo], lengths: Mapping[str, Any], shards: int, blocks: int
) -> dict[str, int]:
    """Return the maximum number of bytes of each part of the file of a group.

    Args:
        inputs: Its inputs.
        lengths: Its counts of lengths.
        shards: The number of its shards.
        blocks: The number of full blocks of its shards.
    """
    shard = ShardInfo(
        name=f"{'0' * 16}/shard-99999-{'0' * 16}.arrow",
        rows=_COUNT,
        tokens=_COUNT,
        trained_tokens=_COUNT,
        bytes=_COUNT,
        sha256="0" * 64,
    )
    block = Block(_COUNT, "0" * 32)
    # Each shard has its last block, which may be smaller, and its end.
    blocks += 2 * shards
    items = [dataclasses.asdict(dataclasses.replace(info, source="")) for info in inputs]
    return {
        "inputs": sum(map(_item_bytes, items)),
        "sources": sum(_string_bytes(info.source) for info in inputs),
        "lengths": _encoded_bytes({"": lengths}),
        "shards": shards * _item_bytes(dataclasses.asdict(shard))
        + blocks * (_item_bytes(dataclasses.asdict(block)) + _INDENT * _LINES_OF_BLOCK),
        "others": _UNKNOWN_BYTES,
    }


# The list of blocks is nested two levels deeper than what `_item_bytes` encodes.
_INDENT, _LINES_OF_BLOCK = 2, 4


def check_manifest_size(known: Mapping[str, Any], groups: int = 1) -> None:
    """Check the size of a build's manifest against the limit of `read_manifest`.

    Args:
        known: As for `manifest_sizes`.
        groups: The number of groups.

    Raises:
        ConfigError: The manifest would be too large.
    """
    _check(manifest_sizes(known, groups), "the manifest of this build")


def check_group_size(
    inputs: Sequence[InputInfo], lengths: Mapping[str, Any], shards: int, blocks: int
) -> None:
    """Check the size of the file of a group against the limit of its readers.

    Args:
        inputs: As for `group_sizes`.
        lengths: As for `group_sizes`.
        shards: As for `group_sizes`.
        blocks: As for `group_sizes`.

    Raises:
        ConfigError: The file would be too large.
    """
    _check(group_sizes(inputs, lengths, shards, blocks), "the file of a group of this build")


def _check(sizes: Mapping[str, int], what: str) -> None:
    size = sum(sizes.values())
    if size > LARGEST_MANIFEST:
        raise _too_large(size, sizes, what)


def manifest_bytes(manifest: Manifest) -> bytes:
    """Return the bytes of a manifest.

    Raises:
        ConfigError: It is larger than `read_manifest` accepts.
    """
    content = manifest.to_json()
    if len(content) > LARGEST_MANIFEST:
        known = {"config": manifest.config, "chat_template": manifest.chat_template}
        sizes = manifest_sizes(known, len(manifest.groups), manifest.num_shards)
        raise _too_large(len(content), sizes, "the manifest of this build")
    return content


def _encoded_bytes(value: object) -> int:
    return len(encode_json(value).encode("utf-8", "surrogatepass"))


def _item_bytes(item: object) -> int:
    """Return the additional bytes of one more item of a list."""
    return _encoded_bytes({"": [item]}) - _encoded_bytes({"": []})


def _string_bytes(text: str) -> int:
    return len(json.dumps(text, ensure_ascii=False).encode("utf-8", "surrogatepass"))


# Part of a manifest that may be large -> its description, and what makes it smaller.
_PARTS = {
    "groups": ("the entries of the groups", f"raise {setting('group_bytes')}"),
    "inputs": ("the entries of the inputs", f"lower {setting('group_bytes')}"),
    "sources": (
        "the names of the sources, which the entry of each input repeats",
        "use a short name for each source of the mixture",
    ),
    "lengths": ("the counts of lengths", f"lower {setting('max_length')}"),
    "shards": (
        "the entries of the shards",
        f"raise {setting('shard_tokens')}",
    ),
    "chat_template": ("the chat template", f"use a shorter one with {setting('chat_template')}"),
    "config.inputs": (
        "the names of the inputs",
        "specify folders or patterns instead of files",
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


def _too_large(size: int, sizes: Mapping[str, int], what: str) -> ConfigError:
    """Return the error for a too large file, with its largest parts by size."""
    largest = sorted(sizes.keys() - {"others"}, key=lambda part: -sizes[part])
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
        f"{what} would have {size / 2**20:,.1f} MiB, and"
        f" {LARGEST_MANIFEST >> 20} MiB at most can be read; the largest parts are"
        f" {', '.join(descriptions)}",
        remedy="; ".join(dict.fromkeys(remedies)),
    )
