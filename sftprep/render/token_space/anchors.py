"""Which added tokens can mark the boundaries of trained regions: the anchors of a tokenizer and a
template.

An added token splits a text before the tokenizer examines anything else. If a template's constants
contain such a token, the rendered text contains it, and the ids of the text contain its id exactly
once for each occurrence. A region "from after the k-th anchor and a literal that follows it to the
m-th anchor" can then be found in the ids, without character positions. The conditions under which
this holds (S1 to S3 of the design notes) are checked here, once for a tokenizer and a template.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from sftprep.tokenize.encoders.bpe_ranks import byte_by_character
from sftprep.tokenize.encoders.char_offsets import byte_family
from sftprep.tokenize.loading.spec import TokenizerSpec, is_matched_literally

_KEEPING_SPLITS = frozenset({"Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"})
_CONTINUATION_BYTE = re.compile(r"<0x[89AB][0-9A-F]>")


class Ending(NamedTuple):
    """The last anchor of a text, and what follows it."""

    anchor: str
    tail: str


@dataclass(frozen=True)
class Anchors:
    """ids: the anchors with their token ids; unsafe: added tokens that take whitespace from the
    text after them, so that no literal may contain one; prepends: whether the tokenizer writes a
    blank at the start of the text after an anchor."""

    ids: dict[str, int]
    unsafe: tuple[str, ...] = ()
    prepends: bool = False

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """The anchors, for `str.startswith`."""
        return tuple(self.ids)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.ids)) or r"(?!)")

    def count(self, text: str) -> int:
        """How many anchors a text contains."""
        return len(self._pattern.findall(text))

    def split(self, text: str) -> list[str]:
        """The parts of a text between its anchors."""
        return self._pattern.split(text)

    def ending(self, text: str) -> Ending | None:
        """The last anchor of a text; None if it contains none."""
        found = [*self._pattern.finditer(text)]
        return Ending(found[-1].group(), text[found[-1].end() :]) if found else None


def find_anchors(
    spec: TokenizerSpec, template: str, *, has_every_byte: bool = False
) -> Anchors | str:
    """The anchors of a tokenizer that a template writes; if there are none, the reason.

    has_every_byte: it is known that the vocabulary of a byte-level tokenizer does not lack a byte.
    """
    fault = _dropped_bytes(spec, has_every_byte=has_every_byte)
    if fault is not None:
        return fault
    entries: list[dict[str, Any]] = spec.part("added_tokens") or []
    normalizes = bool(spec.steps("normalizer", "normalizers"))
    contents = [entry["content"] for entry in entries]
    written = {
        token for name, token in spec.special_tokens.items() if re.search(rf"\b{name}\b", template)
    }
    ids = {
        entry["content"]: entry["id"]
        for entry in entries
        if entry.get("special")
        and (entry["content"] in template or entry["content"] in written)
        and is_matched_literally(entry if normalizes else {**entry, "normalized": False})
        and not any(_overlap(entry["content"], other) for other in contents)
    }
    if not ids:
        return "the template writes no special token that could mark a boundary"
    unsafe = tuple(entry["content"] for entry in entries if entry.get("rstrip"))
    family = byte_family(spec)
    return Anchors(ids, unsafe, prepends=family is not None and family.prepends_space)


def continuation_ids(spec: TokenizerSpec) -> frozenset[int]:
    """Ids of the tokens that contain only the second and later bytes of a character in UTF-8."""
    letters = {letter for letter, byte in byte_by_character().items() if 0x80 <= byte < 0xC0}
    family = byte_family(spec)
    byte_level = family is not None and not family.metaspace
    added = spec.added_tokens()
    return frozenset(
        number
        for token, number in spec.part("model")["vocab"].items()
        if token not in added
        and (letters.issuperset(token) if byte_level else _CONTINUATION_BYTE.fullmatch(token))
    )


def _dropped_bytes(spec: TokenizerSpec, *, has_every_byte: bool) -> str | None:
    """Why the tokens may not cover all bytes of a text (condition S1); None if they do."""
    family = byte_family(spec)
    if spec.split_special_tokens:
        return "the tokenizer does not recognise special tokens inside a text"
    if family is None or not all(map(_keeps_bytes, spec.steps("pre_tokenizer", "pretokenizers"))):
        return "it is not known that the tokens cover every byte of a text"
    if has_every_byte and not family.metaspace:
        return None
    model = spec.part("model")
    needed = (
        {f"<0x{byte:02X}>" for byte in range(256)} if family.metaspace else {*byte_by_character()}
    )
    covered = model["type"] == "BPE" and model["vocab"].keys() >= needed
    if family.metaspace and not model.get("byte_fallback"):
        covered = False
    return None if covered else "the vocabulary does not contain every byte"


def _keeps_bytes(step: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer leaves out no part of a text and adds nothing to it."""
    if step.get("add_prefix_space"):
        return False
    if step["type"] == "Split":
        return step["behavior"] in _KEEPING_SPLITS
    return step["type"] in ("ByteLevel", "Digits")


def _overlap(anchor: str, other: str) -> bool:
    """Whether an occurrence of `other` in a text could overlap an occurrence of `anchor`: one
    contains the other, or an end of one is the start of the other."""
    if anchor != other and (anchor in other or other in anchor):
        return True
    shorter = min(len(anchor), len(other))
    return any(
        anchor.endswith(other[:size]) or other.endswith(anchor[:size]) for size in range(1, shorter)
    )
