"""The tokenizer of a run on a build, and a model that has a row for each of its tokens."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sftprep
from sftprep.errors import TokenizerError
from sftprep.shards import tokenizer_paths
from sfttrain.config.model_config import ModelConfig
from sfttrain.models.adapters import grow_embedding
from sfttrain.models.clone_template import set_end_token
from sfttrain.models.loading import ManifestLike
from sfttrain.models.remote_code import check_code_references, reject_revision_of_folder


def tokenizer_for(
    config: ModelConfig, manifest: ManifestLike, allowed: Sequence[str] = ()
) -> tuple[Any | None, str | None]:
    """Load the tokenizer for the saved model, with the template of the shards.

    Its end token is that of the shards too.

    It is the model's own tokenizer if there is one, else the tokenizer that the shards name.
    `trust_remote_code` applies to the model, which the user named; code of a tokenizer that a
    manifest names never runs.

    Args:
        config: The model.
        manifest: The manifest of the shards.
        allowed: Mismatches that are allowed, as in `check_match`. If "tokenizer" is among them,
            the tokenizer of the shards is preferred.

    Returns:
        The tokenizer, and the fingerprint of the model's own; None where there is none.
    """
    expected = str(manifest.tokenizer.get("fingerprint", ""))
    model_tokenizer = find_tokenizer(
        str(config.model_name_or_path),
        revision=config.model_revision,
        trust_remote_code=config.trust_remote_code,
    )
    added = manifest.tokenizer.get("added", ())
    if model_tokenizer is not None:
        add_tokens(model_tokenizer, added)
    fingerprint = _fingerprint(model_tokenizer, manifest) if model_tokenizer is not None else None
    tokenizer = model_tokenizer
    differs = bool(expected) and fingerprint != expected
    # The tokenizer of the shards is used if the model has none, or if the two differ and this is
    # allowed or cannot be excluded.
    if model_tokenizer is None or (differs and (fingerprint is None or "tokenizer" in allowed)):
        named = find_tokenizer(str(manifest.tokenizer.get("name") or ""))
        if named is not None:
            add_tokens(named, added)
        tokenizer = named or model_tokenizer or _load_stored(manifest)
    if tokenizer is not None:
        use_end_and_template(tokenizer, manifest)
    return tokenizer, fingerprint


def use_end_and_template(tokenizer: Any, manifest: ManifestLike) -> None:
    """Give a tokenizer the template and the end token of a build, in place."""
    # Inference must render prompts and detect the end of an answer as the training did.
    # Of several templates, the manifest has the one named default.
    own_template = tokenizer.chat_template
    if isinstance(own_template, dict):
        own_template = own_template.get("default")
    if manifest.chat_template not in (None, own_template):
        tokenizer.chat_template = manifest.chat_template
    end = manifest.tokenizer.get("eos_token_id")
    if end is not None and end != tokenizer.eos_token_id and int(end) < len(tokenizer):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(int(end))


def _load_stored(manifest: ManifestLike) -> Any | None:
    """Load the tokenizer that a local build has; None if it has none."""
    folder, paths = getattr(manifest, "folder", None), tokenizer_paths(manifest.tokenizer)
    if not isinstance(folder, Path) or not paths:
        return None
    return find_tokenizer(str((folder / next(iter(paths))).parent))


def fit_to_build(model: Any, tokenizer: Any, manifest: ManifestLike) -> int:
    """Prepare a model for the tokens that a build added to its tokenizer.

    The embedding grows if it has too few rows; transformers initializes new rows with the mean of
    the others. A generation ends at the end token of the build.

    Args:
        model: The model.
        tokenizer: The tokenizer of the build.
        manifest: The manifest of the build.

    Returns:
        The number of rows that the embedding was extended by.
    """
    added = manifest.tokenizer.get("added", ())
    if not added:
        return 0
    set_end_token(model, tokenizer, replace=True)
    return grow_embedding(model, tokenizer, max(int(entry["id"]) for entry in added))


def add_tokens(tokenizer: Any, entries: Iterable[Mapping[str, Any]]) -> list[int]:
    """Add tokens to a tokenizer that it does not have, in place.

    Args:
        tokenizer: The tokenizer.
        entries: The tokens, as in tokenizer.json; their ids are ignored.

    Returns:
        The ids of the tokens that are new.
    """
    from tokenizers import AddedToken

    known = {token.content for token in tokenizer.added_tokens_decoder.values()}
    new = [
        AddedToken(**{key: value for key, value in entry.items() if key != "id"})
        for entry in entries
        if entry["content"] not in known
    ]
    if not new:
        return []
    tokenizer.add_tokens(new)
    ids: list[int] = tokenizer.convert_tokens_to_ids([token.content for token in new])
    return ids


def _fingerprint(tokenizer: Any, manifest: ManifestLike) -> str | None:
    """Return the fingerprint of a tokenizer with the end token of the shards.

    `sftprep build ... --eos-token TOKEN` changes the fingerprint of the same tokenizer. The result
    is None for a tokenizer that sftprep cannot read.
    """
    try:
        spec = sftprep.tokenizer_spec(tokenizer)
        end = manifest.tokenizer.get("eos_token_id")
        if end is not None and end != spec.eos_token_id and int(end) < spec.vocab_size:
            spec = spec.with_eos(str(tokenizer.convert_ids_to_tokens(int(end))))
    except TokenizerError:
        return None  # no shards can have been built with it
    return str(spec.fingerprint)


def find_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Any | None:
    """Load a tokenizer; return None for a missing one, or if it needs code.

    Code of the repository runs only with `trust_remote_code`.
    """
    if not name:
        return None
    if os.path.isdir(name) and not any((Path(name) / file).exists() for file in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    reject_revision_of_folder(name, revision)
    if trust_remote_code:
        check_code_references(name, revision)
    try:
        return AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError):
        return None


_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "spiece.model",
)
