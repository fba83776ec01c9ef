"""Anchors: added tokens at the boundaries of trained regions.

Idea: an added token splits a text before the tokenizer examines anything else. If a constant of the
template contains such a token, the rendered text contains it, and the ids of the text contain its
id exactly once for each occurrence. A region "from after the k-th anchor and the literal that
follows it, to the m-th anchor" can then be found in the ids, without character positions.

This holds under three conditions, which are checked here, once for a tokenizer and a template:
S1, the tokens cover every byte of a text, except for bytes that the vocabulary lacks, so texts with
such bytes take the reference path; S2, the anchor is found wherever it occurs, and takes
nothing from the text around it; S3, no other added token can overlap it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from sftprep.core.byte_search import has_any_byte
from sftprep.tokenize.encoders.bpe_ranks import byte_by_character
from sftprep.tokenize.encoders.char_offsets import byte_family
from sftprep.tokenize.loading.spec import TokenizerSpec, is_matched_literally

_KEEPING_SPLITS = frozenset({"Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"})
"""Behaviours of the pre-tokenizer `Split` that keep the whole text; "Removed" does not."""
_CONTINUATION_BYTE = re.compile(r"<0x[89AB][0-9A-F]>")


class Ending(NamedTuple):
    """The last anchor of a text, and the text after it."""

    anchor: str
    tail: str


@dataclass(frozen=True)
class Anchors:
    """The anchors of a tokenizer and a template.

    Example:
        Anchors({"<|im_start|>": 5, "<|im_end|>": 6}).ending("a<|im_end|>\\n")
        ->  Ending("<|im_end|>", "\\n")
    """

    ids: dict[str, int]  # the token id of each anchor
    # Added tokens that take whitespace from the text after them; no literal may contain one.
    unsafe: tuple[str, ...] = ()
    # Whether the tokenizer adds a space at the start of the text after an anchor.
    prepends: bool = False
    # The bytes of UTF-8 that the vocabulary lacks.
    missing_bytes: bytes = b""

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """The anchors as strings, for `str.startswith`."""
        return tuple(self.ids)

    def covers(self, text: str) -> bool:
        """Return whether the vocabulary has a token for each byte of a text."""
        return not (self.missing_bytes and has_any_byte(text, self.missing_bytes))

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.ids)) or r"(?!)")

    def count(self, text: str) -> int:
        """Return the number of anchors in a text."""
        return len(self._pattern.findall(text))

    def split(self, text: str) -> list[str]:
        """Return the parts of a text between its anchors."""
        return self._pattern.split(text)

    def ending(self, text: str) -> Ending | None:
        """Return the last anchor of a text and the rest, or None without an anchor."""
        found = [*self._pattern.finditer(text)]
        return Ending(found[-1].group(), text[found[-1].end() :]) if found else None


def find_anchors(
    spec: TokenizerSpec, template: str, *, has_every_byte: bool = False
) -> Anchors | str:
    """Find the anchors written by a template, or return the reason if there are none.

    Args:
        spec: The tokenizer.
        template: The source of the template.
        has_every_byte: It is known that the vocabulary of a byte-level tokenizer has a token for
            every byte.
    """
    # S1
    fault = _find_dropped_bytes(spec, has_every_byte=has_every_byte)
    if fault is not None:
        return fault
    entries: list[dict[str, Any]] = spec.part("added_tokens") or []
    normalizes = bool(spec.steps("normalizer", "normalizers"))
    contents = [entry["content"] for entry in entries]
    # Tokens that the template writes through a variable such as `bos_token`.
    by_variable = {
        token for name, token in spec.special_tokens.items() if re.search(rf"\b{name}\b", template)
    }
    ids = {
        entry["content"]: entry["id"]
        for entry in entries
        if entry.get("special")
        and (entry["content"] in template or entry["content"] in by_variable)
        # S2; without a normalizer, the flag `normalized` has no effect.
        and is_matched_literally(entry if normalizes else {**entry, "normalized": False})
        # S3
        and not any(_can_overlap(entry["content"], other) for other in contents)
    }
    if not ids:
        return "the template writes no special token that could mark a boundary"
    unsafe = tuple(entry["content"] for entry in entries if entry.get("rstrip"))
    family = byte_family(spec)
    return Anchors(
        ids,
        unsafe,
        prepends=family is not None and family.prepends_space,
        missing_bytes=b"" if has_every_byte else _find_missing_bytes(spec),
    )


def continuation_ids(spec: TokenizerSpec) -> frozenset[int]:
    """Return the ids of tokens without the first byte of a UTF-8 character.

    Such tokens contain only second and later bytes.
    """
    # In a byte-level vocabulary, each byte is written as a character of its own.
    continuation_chars = {char for char, byte in byte_by_character().items() if 0x80 <= byte < 0xC0}
    family = byte_family(spec)
    is_byte_level = family is not None and not family.metaspace
    added = spec.added_tokens()
    return frozenset(
        number
        for token, number in spec.part("model")["vocab"].items()
        if token not in added
        and (
            continuation_chars.issuperset(token)
            if is_byte_level
            else _CONTINUATION_BYTE.fullmatch(token)
        )
    )


def _find_dropped_bytes(spec: TokenizerSpec, *, has_every_byte: bool) -> str | None:
    """Return why tokens may not cover all bytes of a text, or None if they do.

    This is condition S1.
    """
    family = byte_family(spec)
    if spec.split_special_tokens:
        return "the tokenizer does not recognise special tokens inside a text"
    if family is None or not all(map(_keeps_bytes, spec.steps("pre_tokenizer", "pretokenizers"))):
        return "it is not known that the tokens cover every byte of a text"
    model = spec.part("model")
    if family.metaspace:
        # SentencePiece uses its byte tokens only with byte fallback.
        needed = {f"<0x{byte:02X}>" for byte in range(256)}
        has_all = model["vocab"].keys() >= needed and model.get("byte_fallback")
        return None if has_all else "the vocabulary does not contain every byte"
    if not has_every_byte and model["type"] != "BPE":
        return "it is not known that the tokens cover every byte of a text"
    return None


def _find_missing_bytes(spec: TokenizerSpec) -> bytes:
    """Return the bytes of UTF-8 that a byte-level vocabulary lacks."""
    family = byte_family(spec)
    if family is None or family.metaspace:
        return b""
    vocabulary = spec.part("model")["vocab"]
    missing = {byte for char, byte in byte_by_character().items() if char not in vocabulary}
    return bytes(sorted(missing - {0xC0, 0xC1, *range(0xF5, 0x100)}))


def _keeps_bytes(step: dict[str, Any]) -> bool:
    """Return whether a pre-tokenizer omits no part of a text and adds nothing to it."""
    if step.get("add_prefix_space"):
        return False
    if step["type"] == "Split":
        return step["behavior"] in _KEEPING_SPLITS
    return step["type"] in ("ByteLevel", "Digits")


def _can_overlap(anchor: str, other: str) -> bool:
    """Return whether occurrences of two tokens could overlap.

    They could if one contains the other, or an end of one is the start of the other.
    """
    if anchor != other and (anchor in other or other in anchor):
        return True
    shorter = min(len(anchor), len(other))
    return any(
        anchor.endswith(other[:size]) or other.endswith(anchor[:size]) for size in range(1, shorter)
    )
