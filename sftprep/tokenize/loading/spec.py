"""`TokenizerSpec`: what a build must know of a tokenizer, as plain data.

This module also reads it from a live tokenizer (`tokenizer_spec`).
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import orjson

from sftprep.errors import TokenizerError

# transformers sets `model_max_length` to 10**30 for a tokenizer without a limit, and treats every
# number above 10**20 as none.
_NO_LIMIT = 10**20

# Bytes of the JSON in which a model has its settings, before its vocabulary.
_MODEL_HEAD = 400

# Texts for which the special tokens before and after them are determined; they must be the same for
# all texts.
_SAMPLE_TEXTS = ("a", "", "Hello, world!", "  two  blanks\n\n", "12345 中文 é", "\t")


_SPARSE_VOCABULARY, _MOST_IDS_PER_TOKEN = 1 << 20, 16
"""Vocabularies with higher ids than the first number may have this many unused ids per token."""

_TUPLES = ("prefix_ids", "suffix_ids", "missing_bytes", "added")
"""The fields that JSON has as lists."""

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
# The character of each byte in a byte-level vocabulary. Source: `bytes_to_unicode` of GPT-2.
_BYTE_CHARACTERS = {byte: chr(byte) for byte in _PRINTABLE} | {
    byte: chr(0x100 + number) for number, byte in enumerate(sorted({*range(0x100)} - {*_PRINTABLE}))
}


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """A tokenizer as plain data, ready to be sent to a worker process.

    Source: what `transformers.AutoTokenizer` (5.x) makes of the same name, since that is what
    models are trained with.
    """

    name: str  # as the user specified it: a folder, or a name on the Hub
    # The tokenizer in the format of tokenizer.json, as the backend of transformers holds it, but
    # without truncation and padding. Bytes, because it has megabytes and only libraries parse it.
    json: bytes = field(repr=False)
    vocab_size: int  # one more than the highest id
    special_tokens: dict[str, str]  # bos_token, eos_token, ...: the variables of chat templates
    eos_token: str | None
    eos_token_id: int | None
    bos_token_id: int | None
    pad_token_id: int | None
    chat_template: str | None  # of several named templates, the one named "default"
    model_max_length: int | None  # in tokens; None if the tokenizer sets no limit
    prefix_ids: tuple[int, ...]  # ids that `tokenizer(text)` puts before those of a text
    suffix_ids: tuple[int, ...]  # ids that `tokenizer(text)` puts after those of a text
    # Digest of everything that ids depend on, 64 hex digits. The first 32 identify the ids of a
    # text, the others the roles of special tokens (which one ends a text, which one starts it).
    fingerprint: str
    # All templates by name if there are several ("default", "tool_use", ...), else empty.
    named_templates: dict[str, str] = field(default_factory=dict)
    # Whether special tokens that a text spells out are encoded as plain text, a setting in
    # tokenizer_config.json.
    split_special_tokens: bool = False
    # The bytes that a byte-level vocabulary lacks, and which it drops from texts. Many lack some
    # control characters, and one that was trained on one language may lack more.
    missing_bytes: tuple[int, ...] = ()
    # The tokens that were added for a chat template, which the tokenizer of this name lacks: the
    # entries of tokenizer.json, with their ids.
    added: tuple[dict[str, Any], ...] = ()

    def with_eos(self, token: str) -> TokenizerSpec:
        """Return the same tokenizer with another EOS token.

        Raises:
            TokenizerError: The token is not in the vocabulary.
        """
        token_id = self.token_id(token)
        if token_id is None:
            special = ", ".join(list(self.added_tokens())[:12])
            raise TokenizerError(
                f"the end-of-text token {token!r} is not in the vocabulary of {self.name}",
                remedy=(
                    f"use one of its special tokens: {special}"
                    if special
                    else "use a token of its vocabulary; it has no special tokens"
                ),
            )
        special_tokens = {**self.special_tokens, "eos_token": token}
        return dataclasses.replace(
            self,
            special_tokens=special_tokens,
            eos_token=token,
            eos_token_id=token_id,
            fingerprint=self.fingerprint[:32] + _roles_digest(special_tokens),
        )

    def token_id(self, token: str) -> int | None:
        """Return the id of an added or ordinary token, or None for another string."""
        added = self.added_tokens()
        if token in added:
            return added[token]
        vocabulary = self.part("model")["vocab"]
        if isinstance(vocabulary, dict):
            number = vocabulary.get(token)
            return None if number is None else int(number)
        # A unigram model lists its tokens with their scores, in the order of the ids.
        return next(
            (number for number, (piece, _score) in enumerate(vocabulary) if piece == token), None
        )

    def added_tokens(self) -> dict[str, int]:
        """Return the tokens matched as a whole inside a text, with their ids."""
        return {entry["content"]: entry["id"] for entry in self.part("added_tokens") or []}

    def unknown_token_id(self) -> int | None:
        """Return the id for characters outside the vocabulary; None if there is none."""
        # A setting `unk_token` alone says nothing: in GPT-2 it is the EOS token, and never used.
        head = self.json[self.json.index(b'"model":') :][:_MODEL_HEAD]
        found = re.search(rb'"unk_(?:token|id)":\s*(null|\d+|"(?:[^"\\]|\\.)*")', head)
        value = self.special_tokens.get("unk_token") if found is None else orjson.loads(found[1])
        return self.token_id(value) if isinstance(value, str) else value

    def part(self, name: str) -> Any:
        """Return one part of the JSON, or None if it is absent.

        Args:
            name: normalizer, pre_tokenizer, post_processor, decoder, model or added_tokens.
        """
        # The model, which has megabytes, is the last key, and is parsed only if it is requested.
        # Quotes in JSON strings are escaped, so the first `"model":` can only be the key.
        index = self.json.index(b'"model":')
        return orjson.loads(
            self.json if name == "model" else self.json[:index].rstrip(b", \n\t") + b"}"
        ).get(name)

    def steps(self, name: str, key: str) -> list[dict[str, Any]]:
        """Return a part of the JSON as a list of steps.

        Args:
            name: As for `part`.
            key: The key under which a step of the type Sequence lists its steps.

        Example:
            {"type": "Sequence", "normalizers": [A, B]}  ->  [A, B];  A  ->  [A];  None  ->  []
        """
        return _flatten_steps(self.part(name), key)

    def to_fields(self) -> dict[str, Any]:
        """Return all fields but `json`, as JSON values."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "json"}

    @classmethod
    def from_fields(cls, fields: dict[str, Any], json: bytes) -> TokenizerSpec:
        """Return the object for these fields; inverse of `to_fields`.

        Raises:
            KeyError, TypeError: A field is missing or unknown.
        """
        tuples = {name: tuple(fields[name]) for name in _TUPLES if name in fields}
        return cls(json=json, **{**fields, **tuples})


def _flatten_steps(part: Any, key: str) -> list[dict[str, Any]]:
    """Return the steps of a part of tokenizer.json, in order.

    Args:
        part: A step, a sequence of steps, or None.
        key: The key of the steps of a sequence.
    """
    if part is None:
        return []
    return (
        [inner for outer in part[key] for inner in _flatten_steps(outer, key)]
        if part["type"] == "Sequence"
        else [part]
    )


def tokenizer_spec(tokenizer: Any, *, name: str | None = None) -> TokenizerSpec:
    """Return the spec of a live tokenizer.

    Args:
        tokenizer: A tokenizer of transformers (5.x) with a `tokenizers` backend.
        name: The name in the spec; that of the tokenizer by default.

    Raises:
        TokenizerError: The tokenizer has no such backend, cannot be written as JSON (parts in
            Python), is random (BPE dropout), or adds special tokens that depend on the text.
    """
    name = name or str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
    backend = _get_backend(tokenizer, name)
    prefix, suffix = _find_prefix_and_suffix(tokenizer, backend, name)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    vocab_size = max(len(tokenizer), 1 + max(vocabulary.values(), default=-1))
    # Encoders, and the functions below, allocate tables with an entry for each id.
    if vocab_size > max(_SPARSE_VOCABULARY, _MOST_IDS_PER_TOKEN * len(vocabulary)):
        raise TokenizerError(
            f"{name} has {len(vocabulary):,} tokens, but ids up to {vocab_size - 1:,}",
            remedy="check the ids in its tokenizer.json",
        )
    try:
        text = _remove_truncation_and_padding(backend.to_str())
    except Exception as error:  # the Rust bindings raise Exception itself for parts in Python
        raise TokenizerError(
            f"{name} cannot be written as a tokenizer.json: {error}",
            remedy="use a tokenizer without custom parts",
        ) from error

    special_tokens = {
        key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)
    }
    templates = tokenizer.chat_template
    named = dict(templates) if isinstance(templates, dict) else {}
    limit = tokenizer.model_max_length
    split = bool(getattr(tokenizer, "split_special_tokens", False))
    spec = TokenizerSpec(
        name=name,
        json=_optimize_for_loading(text.encode()),
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        eos_token=special_tokens.get("eos_token"),
        eos_token_id=_id_or_none(tokenizer.eos_token_id),
        bos_token_id=_id_or_none(tokenizer.bos_token_id),
        pad_token_id=_id_or_none(tokenizer.pad_token_id),
        chat_template=named.get("default") if named else templates,
        model_max_length=int(limit) if limit is not None and limit < _NO_LIMIT else None,
        prefix_ids=prefix,
        suffix_ids=suffix,
        fingerprint=_fingerprint(text, special_tokens, split),
        named_templates=named,
        split_special_tokens=split,
    )
    return dataclasses.replace(spec, missing_bytes=_find_missing_bytes(spec, vocabulary))


def with_json(spec: TokenizerSpec, text: str) -> TokenizerSpec:
    """Return a tokenizer with another JSON, as its backend writes it, and the same special tokens.

    The fingerprint is that of a live tokenizer with this backend.
    """
    text = _remove_truncation_and_padding(text)
    return dataclasses.replace(
        spec,
        json=_optimize_for_loading(text.encode()),
        fingerprint=_fingerprint(text, spec.special_tokens, spec.split_special_tokens),
    )


def _find_missing_bytes(spec: TokenizerSpec, vocabulary: dict[str, int]) -> tuple[int, ...]:
    """Return the bytes that a vocabulary lacks, if it consists of bytes and has no unknown token.

    Only bytes that UTF-8 uses can be in a text.
    """
    steps = (
        *spec.steps("normalizer", "normalizers"),
        *spec.steps("pre_tokenizer", "pretokenizers"),
    )
    if spec.unknown_token_id() is not None or all(step["type"] != "ByteLevel" for step in steps):
        return ()
    used = (*range(0xC0), *range(0xC2, 0xF5))
    return tuple(byte for byte in used if _BYTE_CHARACTERS[byte] not in vocabulary)


def _get_backend(tokenizer: Any, name: str) -> Any:
    """Return the `tokenizers` backend of a tokenizer; it must not be random.

    Raises:
        TokenizerError: The backend is missing or random.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not getattr(tokenizer, "is_fast", False) or backend is None:
        raise TokenizerError(
            f"{name} is a {type(tokenizer).__name__}, which has no fast backend (tokenizer.json)",
            remedy=(
                "use a tokenizer with a tokenizer.json; for most slow ones,"
                " `AutoTokenizer.from_pretrained(...).save_pretrained(folder)` makes it once"
                " sentencepiece or tiktoken is installed"
            ),
        )
    if getattr(getattr(backend, "model", None), "dropout", None):
        raise TokenizerError(
            f"{name} has BPE dropout: the same text gives different ids each time",
            remedy='set "dropout" to null in its tokenizer.json',
        )
    return backend


def _find_prefix_and_suffix(
    tokenizer: Any, backend: Any, name: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids before and after a text, equal for all sample texts.

    Raises:
        TokenizerError: They differ between the sample texts.
    """
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    for number, text in enumerate(_SAMPLE_TEXTS):
        whole = tuple(tokenizer(text)["input_ids"])
        bare = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        if number == 0:
            start = next((k for k in range(len(whole) + 1) if whole[k : k + len(bare)] == bare), 0)
            prefix, suffix = whole[:start], whole[start + len(bare) :]
        if whole != prefix + bare + suffix:
            raise TokenizerError(
                f"{name} adds special tokens to a text in a way that depends on the text:"
                f" {text!r} gives {list(whole)}",
                remedy="use a tokenizer whose post-processor adds fixed tokens before and after",
            )
        if bare != tuple(backend.encode(text, add_special_tokens=False).ids):
            raise TokenizerError(
                f"{name} ({type(tokenizer).__name__}) changes texts in Python before it passes"
                f" them to its backend: {text!r}",
                remedy="use a tokenizer whose tokenizer.json does all the work",
            )
    return prefix, suffix


def _remove_truncation_and_padding(text: str) -> str:
    """Return the JSON of a tokenizer with both set to null.

    They describe the last call of the tokenizer, since transformers sets them at each call. Without
    this, the fingerprint would depend on the history of the object.
    """
    # Only what precedes the large parts is parsed; the vocabulary is kept as it is.
    head, key, rest = text.partition('"added_tokens":')
    fields = json.loads(re.sub(r",\s*$", "}", head))
    if fields.get("truncation") is None and fields.get("padding") is None:
        return text
    return (
        json.dumps({**fields, "truncation": None, "padding": None}, separators=(",", ":"))[:-1]
        + ","
        + key
        + rest
    )


def _optimize_for_loading(text: bytes) -> bytes:
    """Return the same tokenizer with a sorted vocabulary and merges as strings.

    `tokenizers` loads it in two thirds of the time.
    """
    values = orjson.loads(text)
    model = values["model"]
    if model.get("type") != "BPE":
        return text
    merges = model["merges"]
    if all(isinstance(merge, list) and not any(" " in part for part in merge) for merge in merges):
        model["merges"] = [" ".join(merge) for merge in merges]
    model["vocab"] = dict(sorted(model["vocab"].items()))
    return orjson.dumps(values)


def _fingerprint(text: str, special_tokens: dict[str, str], split_special_tokens: bool) -> str:
    return sha256(f"{split_special_tokens}\n{text}".encode()).hexdigest()[:32] + _roles_digest(
        special_tokens
    )


def _roles_digest(special_tokens: dict[str, str]) -> str:
    # Without the padding token: it is not among the ids of a text, and users often set it between
    # the build and the training.
    roles = sorted((key, value) for key, value in special_tokens.items() if key != "pad_token")
    return sha256(json.dumps(roles).encode()).hexdigest()[:32]


def _id_or_none(value: Any) -> int | None:
    return int(value) if value is not None else None


def is_matched_literally(added_token: dict[str, Any]) -> bool:
    """Return whether an added token matches exactly where its string occurs.

    It matches before normalization, inside words too, and without the whitespace next to it.
    """
    return not any(
        added_token.get(flag) for flag in ("normalized", "lstrip", "rstrip", "single_word")
    )
