"""Addition of special tokens to a tokenizer, as transformers adds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import orjson

from sftprep.config.cache_location import cache_dir
from sftprep.core.versions import version_of
from sftprep.errors import TokenizerError
from sftprep.tokenize.loading.load import read_spec, write_spec
from sftprep.tokenize.loading.spec import TokenizerSpec, with_json

_FORMAT = 1  # to be increased when an entry of the cache, or how it is made, changes
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def special_token(content: str) -> dict[str, Any]:
    """Return the entry of a special token in tokenizer.json, without its id."""
    return {"content": content, **dict.fromkeys(_FLAGS, False), "special": True}


def missing_tokens(spec: TokenizerSpec, entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the entries of tokens that a tokenizer would encode as ordinary text."""
    known = spec.added_tokens()
    return [entry for entry in entries if entry["content"] not in known]


def add_tokens(
    spec: TokenizerSpec, entries: Sequence[dict[str, Any]], *, cache: Path | None = None
) -> TokenizerSpec:
    """Return a tokenizer with further tokens, which get the next free ids.

    Args:
        spec: The tokenizer.
        entries: The tokens that it lacks, as in tokenizer.json; ids are ignored.
        cache: The folder of the results; `cache_dir()` by default.

    Raises:
        TokenizerError: The tokenizer encodes special tokens as plain text.
    """
    if not entries:
        return spec
    if spec.split_special_tokens:
        raise TokenizerError(
            f"the chat template needs the token {entries[0]['content']}, and {spec.name} encodes"
            " special tokens as ordinary text",
            remedy='set "split_special_tokens" to false in its tokenizer_config.json',
        )
    entries = [{key: entry[key] for key in ("content", *_FLAGS)} for entry in entries]
    version = version_of("tokenizers")
    key = sha256(orjson.dumps([_FORMAT, version, spec.fingerprint, entries])).hexdigest()
    path = (cache or cache_dir()) / "tokenizers" / f"{key}.json"
    found = read_spec(path)
    if found is None:
        found = _extend(spec, entries)
        write_spec(path, found)
    return dataclasses.replace(found, name=spec.name)


def _extend(spec: TokenizerSpec, entries: Sequence[dict[str, Any]]) -> TokenizerSpec:
    from tokenizers import AddedToken, Tokenizer

    backend = Tokenizer.from_buffer(spec.json)
    owner = {number: token for token, number in backend.get_vocab(with_added_tokens=True).items()}
    for entry in entries:
        flags = {flag: entry[flag] for flag in _FLAGS}
        token = AddedToken(entry["content"], **flags)
        (backend.add_special_tokens if entry["special"] else backend.add_tokens)([token])
    # Tokens of earlier additions stay those that the original tokenizer lacks.
    added = (*spec.added, *({**e, "id": backend.token_to_id(e["content"])} for e in entries))
    if any(owner.get(entry["id"], entry["content"]) != entry["content"] for entry in added):
        # The library counts the tokens of a vocabulary, of which some ids may not be in use.
        raise TokenizerError(
            f"no tokens can be added to {spec.name}, whose ids have gaps",
            remedy="use the tokenizer of a model that has the tokens of the chat template",
        )
    vocab_size = max(spec.vocab_size, *(entry["id"] + 1 for entry in added))
    extended = with_json(spec, backend.to_str())
    return dataclasses.replace(extended, added=added, vocab_size=vocab_size)
