"""A token that can stand between texts without changing theirs, so that many short texts are encoded in one call."""

from __future__ import annotations

from typing import Any, NamedTuple

from sftprep.tokenize.spec import TokenizerSpec


class Between(NamedTuple):
    """The token as text, and its id."""

    text: str
    id: int


def between_texts(spec: TokenizerSpec) -> Between | None:
    """The token, best one that neither the chat template writes nor texts end with; None where there is none.

    An added token divides a text before anything else looks at it, and byte-level BPE then treats each part as a text of its own.
    It must be found wherever it stands: no other added token may hold the letter that it starts with, but as its own first,
    none may be a longer one that starts with it, and its ends may be no part of a word, for some tokens are only found as words.
    """
    if spec.split_special_tokens or not _is_byte_level(spec.part("pre_tokenizer")):
        return None
    if not all(part.get("type") == "NFC" for part in _parts(spec.part("normalizer"), "normalizers")):
        return None
    entries: list[dict[str, Any]] = spec.part("added_tokens") or []
    used = {*spec.special_tokens.values()}
    template = spec.chat_template or ""
    plain = [
        Between(entry["content"], entry["id"])
        for entry in entries
        if entry.get("special")
        and not any(entry.get(flag) for flag in ("normalized", "lstrip", "rstrip", "single_word"))
        and not any(letter.isalnum() or letter == "_" for letter in (entry["content"][0], entry["content"][-1]))
        and not any(entry["content"][0] in other["content"][1:] for other in entries)
        and not any(other is not entry and other["content"].startswith(entry["content"]) for other in entries)
    ]
    return next((each for each in plain if each.text not in used and each.text not in template), next(iter(plain), None))


def _is_byte_level(pre_tokenizer: Any) -> bool:
    parts = _parts(pre_tokenizer, "pretokenizers")
    levels = [part for part in parts if part["type"] == "ByteLevel"]
    known = all(part["type"] in ("ByteLevel", "Split", "Digits") for part in parts)
    return known and bool(levels) and not any(part.get("add_prefix_space") for part in levels)


def _parts(part: Any, key: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return [inner for outer in part[key] for inner in _parts(outer, key)] if part["type"] == "Sequence" else [part]
