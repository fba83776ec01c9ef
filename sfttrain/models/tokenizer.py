"""Tokenizer of a run, with the requested tokens and template.

It is the user's or the model's own.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import sftprep
from sftprep.errors import ConfigError, SftprepError, TokenizerError, first_line, setting
from sfttrain.config.model_config import ModelConfig
from sfttrain.config.setting_names import TrainerNames
from sfttrain.data.inputs import is_build
from sfttrain.models.adapters import record_new_tokens
from sfttrain.models.build_tokenizer import (
    add_tokens,
    fit_to_build,
    tokenizer_for,
    use_end_and_template,
)
from sfttrain.models.clone_template import clone_chat_template, set_end_token
from sfttrain.models.remote_code import check_code_references, reject_revision_of_folder
from sfttrain.models.unwrap import unwrap_peft

logger = logging.getLogger(__name__)


@dataclass
class RunTokenizer:
    """Tokenizer of a run."""

    processing: Any | None
    """The object that is saved with the model: a tokenizer, or a processor with a tokenizer; None
    if there is none."""
    tokenizer: Any | None
    """The tokenizer itself, with which texts are tokenized."""
    added: list[int] = field(default_factory=list)
    """Ids that are new to the tokenizer, and therefore to the model."""


def resolve_tokenizer(
    model: Any, processing: Any | None, args: Any, sources: Iterable[Any] = (), *, needed: bool
) -> RunTokenizer:
    """Return the tokenizer with the tokens and the template from the settings and the builds.

    The settings are eos_token, pad_token and chat_template_path. The configs of the model get the
    same tokens, and its embedding grows if tokens are new.

    Args:
        model: The model.
        processing: The user's tokenizer or processor; None to load the model's own if necessary.
        args: The SFTConfig.
        sources: The datasets, some of which may be builds that added tokens to their tokenizer.
        needed: Whether raw records are tokenized.

    Raises:
        TokenizerError: If the model's own tokenizer is needed and cannot be loaded.
        ConfigError: If a token is not in the vocabulary.
        TemplateError: If the template cannot be read.
    """
    has_requests = (
        args.eos_token is not None
        or args.pad_token is not None
        or args.chat_template_path is not None
    )
    if processing is None and (needed or has_requests):
        processing = _load_own_tokenizer(model, args)
    run = RunTokenizer(processing, getattr(processing, "tokenizer", processing))
    if run.tokenizer is None:
        return _match_builds(model, run, sources)
    if args.eos_token is not None:
        run.tokenizer.eos_token = _check_known(run.tokenizer, "eos_token", args.eos_token)
        set_end_token(unwrap_peft(model), run.tokenizer, replace=False)
    if args.pad_token is not None:
        run.tokenizer.pad_token = _check_known(run.tokenizer, "pad_token", args.pad_token)
        unwrap_peft(model).config.get_text_config().pad_token_id = run.tokenizer.pad_token_id
    if args.chat_template_path is not None:
        run.added = _set_template(unwrap_peft(model), run, args.chat_template_path)
    return _match_builds(model, run, sources)


def load_required_tokenizer(
    name: str, *, trust_remote_code: bool = False, revision: str | None = None, kind: str = ""
) -> Any:
    """Load the tokenizer of a model for raw records.

    Args:
        name: The folder or Hub name of the model.
        trust_remote_code: Whether code of the repository may run.
        revision: Branch, tag or commit on the Hub.
        kind: The class of a model without a name, for the message.

    Raises:
        TokenizerError: If the model has no tokenizer.
        ConfigError: If a revision is specified for a folder.
    """
    from transformers import AutoTokenizer

    reject_revision_of_folder(name, revision)
    try:
        if not name:
            raise OSError("the model was made from a config")
        if trust_remote_code:
            check_code_references(name, revision)
        return AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise TokenizerError(
            f"raw records need a tokenizer, and the model {name or kind} has none: "
            f"{first_line(error, 400)}",
            remedy=[
                "use a model that has one",
                "pass processing_class=AutoTokenizer.from_pretrained(...)",
            ],
        ) from error


def _load_own_tokenizer(model: Any, args: Any) -> Any:
    config = unwrap_peft(model).config
    name = str(getattr(config, "_name_or_path", "") or "")
    options = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    return load_required_tokenizer(
        name,
        trust_remote_code=args.trust_remote_code,
        # The same commit as the model, which the user may have pinned.
        revision=options.get("revision") or getattr(config, "_commit_hash", None),
        kind=type(model).__name__,
    )


def _check_known(tokenizer: Any, name: str, token: str) -> str:
    """Return the token of a setting; raise ConfigError outside the vocabulary."""
    if token not in tokenizer.get_vocab():
        known = ", ".join(tokenizer.all_special_tokens[:12])
        raise ConfigError(
            f"{setting(name)} is {token!r}, which is not in the vocabulary of the tokenizer",
            remedy=f"choose one of its tokens{f', such as {known}' if known else ''}",
        )
    return token


def _set_template(model: Any, run: RunTokenizer, path: str) -> list[int]:
    """Set the template: a file, one that sftprep has, or that of another tokenizer.

    The tokens of the template that the tokenizer lacks are added to it.

    Returns:
        The ids that are new to the tokenizer.
    """
    assert run.tokenizer is not None
    assert run.processing is not None
    is_file = path.endswith((".jinja", ".j2", ".jinja2")) or os.path.isfile(path)
    if not is_file and (os.path.isdir(path) or path not in sftprep.SHIPPED_TEMPLATES):
        return clone_chat_template(model, run.tokenizer, path).added_tokens
    tokenizer = run.tokenizer
    variables = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    known = {token.content for token in tokenizer.added_tokens_decoder.values()}
    try:
        chosen = sftprep.choose_template(os.path.expanduser(path), variables, known=known)
    except SftprepError as error:
        raise error.shown_by(TrainerNames("train_dataset", None)) from error
    tokenizer.chat_template = run.processing.chat_template = chosen.source
    added = add_tokens(tokenizer, chosen.tokens)
    if chosen.eos_token is not None:
        tokenizer.eos_token = chosen.eos_token
        set_end_token(model, tokenizer, replace=True)
    if added:
        rows = int(model.get_input_embeddings().weight.shape[0])
        if max(added) >= rows:
            model.resize_token_embeddings(max(added) + 1)
        record_new_tokens(model, added)
        logger.info("%d tokens of %s are added to the tokenizer", len(added), path)
    return added


def _match_builds(model: Any, run: RunTokenizer, sources: Iterable[Any]) -> RunTokenizer:
    """Return the tokenizer with the tokens that builds added to it, and fit the model to it.

    Args:
        model: The model, whose embedding may grow.
        run: The tokenizer so far, which is changed in place.
        sources: The datasets; others than builds with added tokens change nothing.
    """
    manifests = (
        source.manifest if hasattr(source, "manifest") else sftprep.read_manifest(source)
        for source in sources
        if hasattr(source, "manifest") or is_build(source)
    )
    for manifest in manifests:
        if not manifest.tokenizer.get("added"):
            continue
        if run.tokenizer is None:
            name = str(getattr(unwrap_peft(model).config, "_name_or_path", "") or "")
            tokenizer, _ = tokenizer_for(ModelConfig(model_name_or_path=name), manifest)
            run = RunTokenizer(tokenizer, tokenizer)
        if run.tokenizer is not None:
            run.added += add_tokens(run.tokenizer, manifest.tokenizer["added"])
            use_end_and_template(run.tokenizer, manifest)
            fit_to_build(unwrap_peft(model), run.tokenizer, manifest)
    return run
