"""What can stand between texts without changing their tokens, so that many short texts are encoded
in one call."""

from __future__ import annotations

from typing import Any, NamedTuple

from sftprep.tokenize.loading.spec import TokenizerSpec, is_matched_literally


class Between(NamedTuple):
    """The token as text, and its id."""

    text: str
    id: int


def find_separator(spec: TokenizerSpec) -> Between | None:
    """The token, best one that neither the chat template writes nor texts end with; None where
    there is none.

    An added token divides a text before anything else looks at it, and byte-level BPE then treats
    each part as a text of its own. It must be found wherever it stands: no other added token may
    hold the letter that it starts with, but as its own first, none may be a longer one that starts
    with it, and its ends may be no part of a word, for some tokens are only found as words.
    """
    if spec.split_special_tokens or not _is_byte_level(
        spec.steps("pre_tokenizer", "pretokenizers")
    ):
        return None
    if not all(part.get("type") == "NFC" for part in spec.steps("normalizer", "normalizers")):
        return None
    entries: list[dict[str, Any]] = spec.part("added_tokens") or []
    used = {*spec.special_tokens.values()}
    template = spec.chat_template or ""
    plain = [
        Between(entry["content"], entry["id"])
        for entry in entries
        if entry.get("special")
        and is_matched_literally(entry)
        and not any(
            letter.isalnum() or letter == "_"
            for letter in (entry["content"][0], entry["content"][-1])
        )
        and not any(entry["content"][0] in other["content"][1:] for other in entries)
        and not any(
            other is not entry and other["content"].startswith(entry["content"])
            for other in entries
        )
    ]
    return next(
        (each for each in plain if each.text not in used and each.text not in template),
        next(iter(plain), None),
    )


def _is_byte_level(pre_tokenizers: list[dict[str, Any]]) -> bool:
    levels = [part for part in pre_tokenizers if part["type"] == "ByteLevel"]
    known = all(part["type"] in ("ByteLevel", "Split", "Digits") for part in pre_tokenizers)
    return known and bool(levels) and not any(part.get("add_prefix_space") for part in levels)
