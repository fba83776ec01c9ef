"""Conversion of byte-level BPE vocabularies to ranks, for faster loading.

gigatoken loads ranks in half the time.

The idea: a tokenizer.json lists the pairs of tokens that merge, in order of priority. Ranks (the
tiktoken format) have no such list: any two neighbors whose concatenation is a token may merge, and
the lowest id merges first. Both rules give the same tokens if

1. every token of more than one byte is made by exactly one merge, and ids ascend in the order of
   the merges, so that "lowest id first" is "earliest merge first"; and
2. every token, split into its bytes and merged with lower ids only, ends as the two parts of its
   own merge, so that no other pair of neighbors can ever make it.

`derive_ranks` proves both for each token, and returns None if a proof fails; the tokenizer.json is
then loaded as it is. Cost: about a second for a vocabulary of 150,000 tokens, once per tokenizer,
since the result is cached. Reference: `tokenizers` on the same vocabulary
(tests/tokenize/test_bpe_ranks.py).
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

_FORMAT = "1"  # to be increased when the proof, or the format of the cache, changes
_FOLDER = "ranks"  # subfolder of the cache
# Regular expression that splits a string into words -> the name that gigatoken has for it.
_SCHEMES = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2"
}


@dataclass(frozen=True, slots=True)
class Ranks:
    """A tokenizer in the fast-loading form of gigatoken."""

    path: Path  # the file of the ranks
    scheme: str  # gigatoken's name for how strings are split into words
    specials: dict[str, int]  # added tokens and their ids
    normalizes: bool  # the tokenizer applies NFC to its input; ranks do not


def find_ranks(spec: TokenizerSpec, folder: Path) -> Ranks | None:
    """Return the cached ranks of a tokenizer; None if missing or damaged.

    Args:
        spec: The tokenizer.
        folder: The folder of the cache.
    """
    scheme = find_scheme(spec)
    entry = read_entry(_entry_path(spec, folder)) if scheme else None
    if scheme is None or entry is None or not entry[0].get("ranks"):
        return None
    path = folder / _FOLDER / entry[0]["ranks"]
    try:
        # The file is named by its digest. gigatoken would load damaged ranks without an error.
        if xxhash.xxh3_128_hexdigest(path.read_bytes()) != path.stem:
            return None
    except OSError:
        return None
    return Ranks(path, scheme, spec.added_tokens(), normalizes=bool(spec.part("normalizer")))


def cache_ranks(spec: TokenizerSpec, folder: Path) -> None:
    """Derive the ranks of a tokenizer and cache them, unless done before.

    A cache that cannot be written costs time only.

    Args:
        spec: The tokenizer.
        folder: The folder of the cache.
    """
    if find_scheme(spec) is None or read_entry(_entry_path(spec, folder)) is not None:
        return
    ranks = derive_ranks(orjson.loads(spec.json)["model"], spec.added_tokens())
    name = ""  # an entry without a file: the proof failed, and need not be tried again
    if ranks is not None:
        content = b"".join(b"%s %d\n" % (b64encode(token), rank) for token, rank in ranks)
        name = f"{xxhash.xxh3_128_hexdigest(content)}.tiktoken"
        if not write_whole(folder / _FOLDER / name, content):
            return
    write_entry(_entry_path(spec, folder), {"ranks": name})


def derive_ranks(model: dict[str, Any], added: dict[str, int]) -> list[tuple[bytes, int]] | None:
    """Return the tokens of a byte-level BPE model with their ranks.

    Args:
        model: The model of a tokenizer.json.
        added: The added tokens, which are matched before any merge and need no rank.

    Returns:
        The bytes of each token and its id, ascending by id; None if merging by ranks is not proven
        to be equivalent.
    """
    # Only plain BPE: each of these options changes how strings are merged.
    plain = model.get("type") == "BPE" and not any(
        model.get(key)
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    )
    byte_of = byte_by_character()
    vocabulary = {
        token: number for token, number in model["vocab"].items() if added.get(token) != number
    }
    if not plain or not all(character in byte_of for token in vocabulary for character in token):
        return None

    # Tokens and merges as bytes.
    ids = {bytes(map(byte_of.__getitem__, token)): number for token, number in vocabulary.items()}
    pairs = [
        tuple(merge) if isinstance(merge, list) else tuple(merge.split(" "))
        for merge in model["merges"]
    ]
    if not all(character in byte_of for pair in pairs for part in pair for character in part):
        return None
    merges = [tuple(bytes(map(byte_of.__getitem__, part)) for part in pair) for pair in pairs]

    # Condition 1: one merge for each token but the 256 single bytes, in the order of the ids.
    merged_ids = [ids.get(b"".join(pair), -1) for pair in merges]
    ascending = all(low < high for low, high in zip([-1, *merged_ids], merged_ids, strict=False))
    if (
        not ascending
        or len(ids) != len(merged_ids) + 256
        or not all(bytes([byte]) in ids for byte in range(256))
    ):
        return None

    # Condition 2: with lower ids only, each token ends as the two parts of its merge.
    if any(
        _merge_below(b"".join(pair), number, ids) != list(pair)
        for pair, number in zip(merges, merged_ids, strict=True)
    ):
        return None

    # gigatoken counts ranks from 0 and accepts no gap.
    by_id = sorted(ids.items(), key=lambda item: item[1])
    return by_id if [number for _, number in by_id] == list(range(len(by_id))) else None


def _merge_below(token: bytes, limit: int, ids: dict[bytes, int]) -> Sequence[bytes]:
    """Merge the bytes of a token with ids below `limit`, the lowest id first.

    Of equal ids, the leftmost pair merges first.
    """
    parts = [token[index : index + 1] for index in range(len(token))]
    while True:
        lowest, position = limit, -1
        for index in range(len(parts) - 1):
            number = ids.get(parts[index] + parts[index + 1], limit)
            if number < lowest:
                lowest, position = number, index
        if position < 0:
            return parts
        parts[position : position + 2] = [parts[position] + parts[position + 1]]


def byte_by_character() -> dict[str, int]:
    """Return the byte represented by each character of byte-level BPE.

    Source: the inverse of `bytes_to_unicode` of GPT-2.

    Example:
        byte_by_character()["a"]  ->  97;  byte_by_character()["Ġ"]  ->  32, the space
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    # All other bytes are written as the characters from U+0100 on, in order.
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


def find_scheme(spec: TokenizerSpec) -> str | None:
    """Return gigatoken's name for how a tokenizer splits strings into words.

    Returns:
        None if the scheme is not known here, or if the tokenizer does more than that.
    """
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


def _entry_path(spec: TokenizerSpec, folder: Path) -> Path:
    # The first half of the fingerprint names the ids; the roles of special tokens do not matter.
    key = json.dumps([_FORMAT, spec.fingerprint[:32]]).encode()
    return folder / _FOLDER / f"{xxhash.xxh3_128_hexdigest(key)}.json"
