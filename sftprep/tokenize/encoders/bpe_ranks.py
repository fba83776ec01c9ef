"""Byte-level BPE vocabularies as ranks, which gigatoken loads in half the time of a tokenizer.json:
where it is proven the same.

Merging by ranks merges any two neighbours that together are a token, the lowest id first; a
tokenizer.json names the pairs that merge, and their order. The two are the same where ids follow
the order of the merges and every token, cut back to its bytes and merged with nothing but lower
ids, ends as its own pair: two other neighbours can then never add up to it. That is worked out once
for a tokenizer (a second) and kept in the cache; what is not proven is loaded as it was.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import xxhash

from sftprep.core.disk_cache import read_entry, write_entry, write_whole
from sftprep.tokenize.loading.spec import TokenizerSpec, is_matched_literally

_FORMAT = "1"
"""Raised when what is proven, or the way it is kept, changes."""
_FOLDER = "ranks"
"""In that of the cache."""
_SCHEMES = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2"
}
"""gigatoken's names of the expressions that cut texts into words."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """What gigatoken takes. path: of the ranks; scheme: how texts are cut; specials: ids of the
    added tokens; normalizes: the tokenizer makes NFC of its texts, which ranks do not."""

    path: Path
    scheme: str
    specials: dict[str, int]
    normalizes: bool


def find_ranks(spec: TokenizerSpec, folder: Path) -> Ranks | None:
    """The ranks of a tokenizer, where `cache_ranks` found some and they are undamaged. folder: that
    of the cache."""
    scheme = find_scheme(spec)
    entry = read_entry(_entry(spec, folder)) if scheme else None
    if scheme is None or entry is None or not entry[0].get("ranks"):
        return None
    path = folder / _FOLDER / entry[0]["ranks"]
    try:
        if xxhash.xxh3_128_hexdigest(path.read_bytes()) != path.stem:
            return None
    except OSError:
        return None
    return Ranks(path, scheme, spec.added_tokens(), normalizes=bool(spec.part("normalizer")))


def cache_ranks(spec: TokenizerSpec, folder: Path) -> None:
    """Work out once whether a tokenizer has ranks, and keep them in the cache. One that cannot be
    written costs time only."""
    if find_scheme(spec) is None or read_entry(_entry(spec, folder)) is not None:
        return
    ranks = derive_ranks(orjson.loads(spec.json)["model"], spec.added_tokens())
    name = ""
    if ranks is not None:
        content = b"".join(b"%s %d\n" % (b64encode(token), number) for token, number in ranks)
        name = f"{xxhash.xxh3_128_hexdigest(content)}.tiktoken"
        if not write_whole(folder / _FOLDER / name, content):
            return
    write_entry(_entry(spec, folder), {"ranks": name})


def derive_ranks(model: dict[str, Any], added: dict[str, int]) -> list[tuple[bytes, int]] | None:
    """Tokens and ids of a byte-level BPE model of a tokenizer.json, by id; None where merging by
    ranks is not proven the same.

    added: the added tokens, which no text is merged to and which are not among the ranks.
    """
    plain = model.get("type") == "BPE" and not any(
        model.get(key)
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    )
    letters = byte_by_character()
    vocabulary = {
        token: number for token, number in model["vocab"].items() if added.get(token) != number
    }
    if not plain or not all(letter in letters for token in vocabulary for letter in token):
        return None
    ids = {bytes(map(letters.__getitem__, token)): number for token, number in vocabulary.items()}
    pairs = [
        tuple(merge) if isinstance(merge, list) else tuple(merge.split(" "))
        for merge in model["merges"]
    ]
    if not all(letter in letters for pair in pairs for part in pair for letter in part):
        return None
    merges = [tuple(bytes(map(letters.__getitem__, part)) for part in pair) for pair in pairs]
    made = [ids.get(b"".join(pair), -1) for pair in merges]
    in_order = all(lower < higher for lower, higher in zip([-1, *made], made, strict=False))
    # All tokens but single bytes are made by one merge each.
    if (
        not in_order
        or len(ids) != len(made) + 256
        or not all(bytes([byte]) in ids for byte in range(256))
    ):
        return None
    if any(
        _merged(b"".join(pair), number, ids) != list(pair)
        for pair, number in zip(merges, made, strict=True)
    ):
        return None
    by_id = sorted(ids.items(), key=lambda item: item[1])
    # gigatoken counts them from 0, without a gap.
    return by_id if [number for _, number in by_id] == list(range(len(by_id))) else None


def _merged(token: bytes, below: int, ids: dict[bytes, int]) -> Sequence[bytes]:
    """The bytes of a token merged as far as ids below that one go, the lowest first and from the
    left."""
    parts = [token[place : place + 1] for place in range(len(token))]
    while True:
        best, at = below, -1
        for place in range(len(parts) - 1):
            number = ids.get(parts[place] + parts[place + 1], below)
            if number < best:
                best, at = number, place
        if at < 0:
            return parts
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def byte_by_character() -> dict[str, int]:
    """The letters that byte-level BPE writes for bytes. Source: `bytes_to_unicode` of GPT-2."""
    shown = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    return {chr(byte): byte for byte in shown} | {
        chr(256 + place): byte for place, byte in enumerate(hidden)
    }


def find_scheme(spec: TokenizerSpec) -> str | None:
    """gigatoken's name for how the tokenizer cuts texts; None where it is none of those known here,
    or does more than that."""
    if not all(map(is_matched_literally, spec.part("added_tokens") or ())):
        return None
    if spec.part("normalizer") not in (None, {"type": "NFC"}):
        return None
    parts = (spec.part("pre_tokenizer") or {}).get("pretokenizers", ())
    if (
        len(parts) != 2
        or parts[1]["type"] != "ByteLevel"
        or parts[1].get("add_prefix_space")
        or parts[1].get("use_regex", True)
    ):
        return None
    split = parts[0]
    if split["type"] != "Split" or split.get("behavior") != "Isolated" or split.get("invert"):
        return None
    return _SCHEMES.get(split["pattern"].get("Regex", ""))


def _entry(spec: TokenizerSpec, folder: Path) -> Path:
    return (
        folder
        / _FOLDER
        / f"{xxhash.xxh3_128_hexdigest(json.dumps([_FORMAT, spec.fingerprint[:32]]).encode())}.json"
    )
