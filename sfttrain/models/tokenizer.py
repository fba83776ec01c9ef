"""The tokenizer of a run: the one given or the model's own, with the end, the padding and the
template that were asked for."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sftprep.errors import ConfigError, TemplateError, TokenizerError
from sfttrain.models.clone_template import clone_chat_template, end_with
from sfttrain.models.unwrap import unwrap_peft


@dataclass
class RunTokenizer:
    """What is saved beside the model, and what texts are tokenized with."""

    processing: Any | None
    """As it was given: a tokenizer, or a processor that has one; None where there is none."""
    tokenizer: Any | None
    """The tokenizer itself."""
    added: list[int] = field(default_factory=list)
    """Ids that are new to the tokenizer, and so to the model."""


def settle_tokenizer(
    model: Any, processing: Any | None, args: Any, *, needed: bool
) -> RunTokenizer:
    """The tokenizer with what `args` asks of it (eos_token, pad_token, chat_template_path), told to
    the model too.

    needed: raw records are to be tokenized, so that one is loaded from the model's own folder where
    none is given. Raises TokenizerError where that fails, ConfigError for a token that is not in
    the vocabulary, TemplateError.
    """
    asked = (
        args.eos_token is not None
        or args.pad_token is not None
        or args.chat_template_path is not None
    )
    if processing is None and (needed or asked):
        processing = _own_tokenizer(model, args)
    run = RunTokenizer(processing, getattr(processing, "tokenizer", processing))
    if run.tokenizer is None:
        return run
    if args.eos_token is not None:
        run.tokenizer.eos_token = _known(run.tokenizer, "eos_token", args.eos_token)
        end_with(unwrap_peft(model), run.tokenizer, only=False)
    if args.pad_token is not None:
        run.tokenizer.pad_token = _known(run.tokenizer, "pad_token", args.pad_token)
        unwrap_peft(model).config.get_text_config().pad_token_id = run.tokenizer.pad_token_id
    if args.chat_template_path is not None:
        run.added = _with_template(unwrap_peft(model), run, args.chat_template_path)
    return run


def tokenizer_of(
    name: str, *, trust_remote_code: bool = False, revision: str | None = None, kind: str = ""
) -> Any:
    """The tokenizer in a model's folder, or of its name on the Hub; kind: what to call a model
    without a name.

    Raises TokenizerError where there is none.
    """
    from transformers import AutoTokenizer

    try:
        if not name:
            raise OSError("the model was made from a config")
        return AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise TokenizerError(
            f"raw records need a tokenizer, and the model {name or kind} has none: "
            f"{(str(error).strip().splitlines() or [''])[0][:300]}",
            remedy=(
                "give a model that has one, or processing_class=AutoTokenizer.from_pretrained(...)"
            ),
        ) from error


def _own_tokenizer(model: Any, args: Any) -> Any:
    config = unwrap_peft(model).config
    name = str(getattr(config, "_name_or_path", "") or "")
    options = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    kind = type(model).__name__
    return tokenizer_of(
        name,
        trust_remote_code=args.trust_remote_code,
        # Of the same commit as the model, which the user may have pinned.
        revision=options.get("revision") or getattr(config, "_commit_hash", None),
        kind=kind,
    )


def _known(tokenizer: Any, name: str, token: str) -> str:
    if token not in tokenizer.get_vocab():
        some = ", ".join(tokenizer.all_special_tokens[:12]) or "it has none"
        raise ConfigError(
            f"{name} is {token!r}, which is not in the vocabulary of the tokenizer",
            remedy=f"its special tokens: {some}",
        )
    return token


def _with_template(model: Any, run: RunTokenizer, path: str) -> list[int]:
    """Set the template from a file, or take it over from another tokenizer; the ids that are new by
    that."""
    assert run.tokenizer is not None
    assert run.processing is not None
    if not path.endswith((".jinja", ".j2", ".jinja2")):
        return clone_chat_template(model, run.tokenizer, path).added_tokens
    try:
        source = Path(os.path.expanduser(path)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(
            f"cannot read the chat template {path}: {error}",
            remedy="check the path given as chat_template_path",
        ) from error
    run.tokenizer.chat_template = source
    run.processing.chat_template = source
    return []
