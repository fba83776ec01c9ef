"""What a build needs to know of a tokenizer, as plain data: `TokenizerSpec`, and how it is read off
a live one."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import orjson

from sftprep.errors import TokenizerError

_NO_LIMIT = 10**20
"""transformers gives 10**30 as `model_max_length` where a tokenizer has none, and takes anything
above 10**20 for that."""

_WRAPPED_TEXTS = ("a", "", "Hello, world!", "  two  blanks\n\n", "12345 中文 é", "\t")
"""Texts on which the special tokens around a text are looked for; whatever the text, they must be
the same."""


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """A tokenizer as plain data, which can be sent to a worker process (`facts`, `from_fields`).

    Source: what `transformers.AutoTokenizer` (5.x) makes of the same name, since that is what
    people train with.
    """

    name: str
    """What the user gave: a folder, or a name on the Hub."""
    json: bytes = field(repr=False)
    """The tokenizer in the format of tokenizer.json, as the backend of transformers holds it;
    without truncation and padding. Megabytes, and nobody here needs them as text."""
    vocab_size: int
    """One more than the highest id."""
    special_tokens: dict[str, str]
    """bos_token, eos_token, pad_token, unk_token ...: what chat templates see."""
    eos_token: str | None
    eos_token_id: int | None
    bos_token_id: int | None
    pad_token_id: int | None
    chat_template: str | None
    """The template, or of several named ones the one named "default"."""
    model_max_length: int | None
    """None where the tokenizer sets no limit."""
    prefix_ids: tuple[int, ...]
    """Ids that `tokenizer(text)` puts before those of a text."""
    suffix_ids: tuple[int, ...]
    """Ids that `tokenizer(text)` puts after those of a text."""
    fingerprint: str
    """Digest of everything that ids depend on: 64 hex digits, of which the first 32 name the ids of
    a text, and the others the roles of special tokens (which one ends a text, which one templates
    write first)."""
    named_templates: dict[str, str] = field(default_factory=dict)
    """All templates by name where there are several ("default", "tool_use", ...), else empty."""
    split_special_tokens: bool = False
    """Whether special tokens that a text spells out are taken for plain text (a setting in
    tokenizer_config.json)."""

    def with_eos(self, token: str) -> TokenizerSpec:
        """The same tokenizer with `token` as its end of text. Raises TokenizerError where it is not
        in the vocabulary."""
        token_id = self.token_id(token)
        if token_id is None:
            raise TokenizerError(
                f"the end-of-text token {token!r} is not in the vocabulary of {self.name}",
                remedy=(
                    "give one of its special tokens:"
                    f" {', '.join(list(self.added_tokens())[:12]) or 'it has none'}"
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
        """Id of a token of the vocabulary, added or not; None where there is none."""
        added = self.added_tokens()
        if token in added:
            return added[token]
        vocabulary = self.part("model")["vocab"]
        if isinstance(vocabulary, dict):
            found = vocabulary.get(token)
            return None if found is None else int(found)
        return next(
            (position for position, (piece, _score) in enumerate(vocabulary) if piece == token),
            None,
        )

    def added_tokens(self) -> dict[str, int]:
        """Tokens that are recognised as a whole inside a text, with their ids."""
        return {entry["content"]: entry["id"] for entry in self.part("added_tokens") or []}

    def part(self, name: str) -> Any:
        """One part of the JSON (normalizer, pre_tokenizer, post_processor, decoder, model,
        added_tokens), None if absent.

        The model, which is megabytes, comes last, and is parsed only where it is asked for. Inside
        a JSON string a quote is escaped, so that the first `"model":` is the key and nothing else.
        """
        place = self.json.index(b'"model":')
        return orjson.loads(
            self.json if name == "model" else self.json[:place].rstrip(b", \n\t") + b"}"
        ).get(name)

    def steps(self, name: str, key: str) -> list[dict[str, Any]]:
        """A part of the JSON as a list of steps: a Sequence, whose steps are under `key`, is
        unfolded; none is empty."""
        return _unfolded(self.part(name), key)

    def to_fields(self) -> dict[str, Any]:
        """All but `json`, as JSON values, for a file."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "json"}

    @classmethod
    def from_fields(cls, facts: dict[str, Any], json: bytes) -> TokenizerSpec:
        """The inverse of `facts`. Raises TypeError or KeyError where they are something else."""
        around = {name: tuple(facts[name]) for name in ("prefix_ids", "suffix_ids")}
        return cls(json=json, **{**facts, **around})


def _unfolded(part: Any, key: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return (
        [inner for outer in part[key] for inner in _unfolded(outer, key)]
        if part["type"] == "Sequence"
        else [part]
    )


def tokenizer_spec(tokenizer: Any, *, name: str | None = None) -> TokenizerSpec:
    """Read the spec off a live tokenizer of transformers (5.x, with a `tokenizers` backend).

    Raises TokenizerError where the tokenizer has no such backend, cannot be written down (parts in
    Python), is random (BPE dropout), or puts special tokens around a text in a way that depends on
    the text.
    """
    name = name or str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
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
            f"{name} has BPE dropout: the same text gives other ids each time",
            remedy='set "dropout" to null in its tokenizer.json',
        )
    prefix, suffix = _around(tokenizer, backend, name)
    try:
        text = _without_truncation_and_padding(backend.to_str())
    except (
        Exception
    ) as error:  # the bindings raise the bare class, for parts that are written in Python
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
    return TokenizerSpec(
        name=name,
        json=_quick_to_load(text.encode()),
        vocab_size=max(
            len(tokenizer), 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        ),
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


def _around(tokenizer: Any, backend: Any, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids before and after a text, checked to be the same around every one of a few texts."""
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    for number, text in enumerate(_WRAPPED_TEXTS):
        whole = tuple(tokenizer(text)["input_ids"])
        bare = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        if number == 0:
            start = next((k for k in range(len(whole) + 1) if whole[k : k + len(bare)] == bare), 0)
            prefix, suffix = whole[:start], whole[start + len(bare) :]
        if whole != prefix + bare + suffix:
            raise TokenizerError(
                f"{name} puts special tokens around a text in a way that depends on the text:"
                f" {text!r} gives {list(whole)}",
                remedy="use a tokenizer whose post-processor adds fixed tokens before and after",
            )
        if bare != tuple(backend.encode(text, add_special_tokens=False).ids):
            raise TokenizerError(
                f"{name} ({type(tokenizer).__name__}) changes texts in Python before its backend"
                f" sees them: {text!r}",
                remedy="use a tokenizer whose tokenizer.json does all the work",
            )
    return prefix, suffix


def _without_truncation_and_padding(text: str) -> str:
    """The JSON with both set to null: they are how a tokenizer was last used, and transformers sets
    them at each call."""
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


def _quick_to_load(text: bytes) -> bytes:
    """The same tokenizer, its vocabulary sorted and its merges as text: `tokenizers` loads that in
    two thirds of the time."""
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
    # The padding token is left out: it is not among the ids of a text, and people set it on the way
    # to the trainer.
    roles = sorted((key, value) for key, value in special_tokens.items() if key != "pad_token")
    return sha256(json.dumps(roles).encode()).hexdigest()[:32]


def _id_or_none(value: Any) -> int | None:
    return int(value) if value is not None else None


def is_matched_literally(added_token: dict[str, Any]) -> bool:
    """Whether an added token is found wherever it is spelled, before anything is normalized, and
    takes no blanks beside it."""
    return not any(
        added_token.get(flag) for flag in ("normalized", "lstrip", "rstrip", "single_word")
    )
