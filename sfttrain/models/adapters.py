"""Adapters: insertion into a model, training of new tokens, and merging.

A frozen embedding would leave tokens that are new to the model as random as they were initialized.
Therefore their rows of the embedding, and of a head that is not tied to it, are trained together
with the adapter.
"""

from __future__ import annotations

import copy
import logging
import os
from pathlib import Path
from typing import Any

import torch

from sftprep.errors import ConfigError, TrainingDiverged, first_line, setting
from sfttrain.checkpoints.output_folders import reject_to_replace, save_errors
from sfttrain.checkpoints.own_files import begin_folder
from sfttrain.checkpoints.seal import seal_checkpoint
from sfttrain.config.model_config import ModelConfig
from sfttrain.finite import all_tensors, names_not_finite
from sfttrain.models.bnb_cpu import keep_gradients
from sfttrain.models.loading import load_model

logger = logging.getLogger(__name__)


def add_adapter(model: Any, peft_config: Any, *, tokenizer: Any | None = None) -> Any:
    """Insert an adapter into a model.

    A quantized model is prepared for training. The rows of new tokens are trained too, in the
    embedding and in a head that is not tied to it; see `find_new_token_rows`.

    Args:
        model: The model.
        peft_config: The configuration of the adapter, which is not changed.
        tokenizer: The tokenizer of the training; None if it is not known.

    Returns:
        The PeftModel.

    Raises:
        ConfigError: If the model has no layers of the specified names, or has an adapter already.
    """
    from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training

    if isinstance(model, PeftModel):
        raise ConfigError(
            "the model has an adapter already",
            remedy="remove peft_config to continue the training of that adapter",
        )
    if (
        getattr(model, "is_loaded_in_8bit", False)
        and getattr(peft_config, "use_dora", False)
        and model.device.type == "cpu"
    ):
        # The weight norms of DoRA lose the scales of the weights at the second forward (peft 0.21).
        raise ConfigError(
            "DoRA does not work with an 8-bit base model on a CPU",
            remedy=[
                f"use {setting('load_in_4bit', True)}",
                f"remove {setting('use_dora')} or {setting('load_in_8bit')}",
            ],
        )
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        # This freezes the model and keeps norms and head in float32. The trainer switches gradient
        # checkpointing on.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        keep_gradients(model)
    peft_config = _add_new_tokens(model, peft_config, find_new_token_rows(model, tokenizer))
    try:
        adapted = get_peft_model(model, peft_config)
    except ValueError as error:
        raise ConfigError(
            f"no adapter can be inserted into {type(model).__name__}: {first_line(error, 400)}",
            remedy=[
                f"name layers of this model in {setting('lora_target_modules')}",
                f"remove {setting('lora_target_modules')}, which selects all linear layers",
            ],
        ) from error
    # With gradient checkpointing, no gradient reaches the adapters of the first layers unless the
    # output of the embedding requires one.
    adapted.enable_input_require_grads()
    return adapted


def record_new_tokens(model: Any, ids: list[int]) -> None:
    """Record new rows of the embedding on a model, for `find_new_token_rows`."""
    model.sft_new_tokens = sorted({*getattr(model, "sft_new_tokens", ()), *ids})


def find_new_token_rows(model: Any, tokenizer: Any | None = None) -> list[int]:
    """Return the rows of the embedding not trained in the checkpoint, ascending.

    1. Rows that `record_new_tokens` recorded.
    2. Rows beyond the embedding of the checkpoint, whose size is in its config.
    3. Rows of tokens that the tokenizer has and the checkpoint's own tokenizer does not have, where
       the embedding had spare rows.

    Steps 2 and 3 are skipped if the checkpoint or its tokenizer is not on this machine any more.

    Args:
        model: The model.
        tokenizer: The tokenizer of the training; None to skip step 3, and to count all rows in
            step 2.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])
    found = set(getattr(model, "sft_new_tokens", ()))
    name = str(getattr(model.config, "_name_or_path", "") or "")
    before = _checkpoint_rows(name)
    used = set(range(rows)) if tokenizer is None else set(tokenizer.get_vocab().values())
    if before is not None:
        found |= {row for row in used if row >= before}
    if tokenizer is not None and name and (vocabulary := _load_vocabulary(name)) is not None:
        known = set(vocabulary.values())
        found |= {number for number in used if number not in known}
    return sorted(row for row in found if row < rows)


def grow_embedding(model: Any, tokenizer: Any, largest: int) -> int:
    """Grow the embedding for a tokenizer with more tokens than the model.

    Nothing changes if the embedding is large enough, or if the tokenizer is not the checkpoint's
    own with tokens added: then the ids have other meanings, and a larger embedding would only
    hide the mismatch.

    Args:
        model: The model, whose embedding is resized.
        tokenizer: The tokenizer of the shards.
        largest: The largest token id in the shards.

    Returns:
        The number of added rows.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])
    own = _load_vocabulary(str(getattr(model.config, "_name_or_path", "") or ""))
    vocabulary = tokenizer.get_vocab()
    if (
        largest < rows
        or own is None
        or any(vocabulary.get(token) != number for token, number in own.items())
    ):
        return 0
    needed: int = max(largest, *vocabulary.values()) + 1
    model.resize_token_embeddings(needed)
    record_new_tokens(model, list(range(rows, needed)))
    return needed - rows


def merge_adapter(
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    base: ModelConfig,
    device: torch.device,
    trained: Any | None = None,
    tokenizer: Any | None = None,
) -> None:
    """Merge a saved adapter into its base model, and save a plain transformers model.

    A quantized base is dequantized first, to the values that it had during training. Merging into
    4 bits would round the adapter away, and the weights before the quantization are not those on
    which the adapter was trained.

    Args:
        adapter: The folder of the adapter.
        output: The folder for the merged model.
        base: The base model as it was loaded for the training; it is loaded again.
        device: The device for merging.
        trained: The base model of the training, of which the merged one gets the number of rows of
            the embedding and the tokens at which a generation ends; None for those of `base`.
        tokenizer: The tokenizer that is saved with the model; None for no tokenizer.

    Raises:
        TrainingDiverged: If the merged model is not finite; nothing is written then.
        OutputExists: If `output` has files that are not of an earlier merge; nothing is written
            then.
    """
    from peft import PeftModel

    reject_to_replace(Path(output))
    model = load_model(base, device=device)
    if base.load_in_4bit or base.load_in_8bit:
        model = model.dequantize()
    if trained is not None:
        _copy_vocabulary(trained, model)
    adapted = PeftModel.from_pretrained(model, os.fspath(adapter))
    merged = adapted.merge_and_unload(safe_merge=False)  # all of its tensors are checked here
    if names := names_not_finite(all_tensors(merged)):
        raise TrainingDiverged(
            f"the merged model is not finite ({names[0]}{' and others' if names[1:] else ''}), so"
            f" it is not saved; the adapter is in {os.fspath(adapter)}",
            remedy=(
                f"check that the base model is finite, and that {setting('dtype')} can represent"
                " the sum"
            ),
        )
    embedding, head = merged.get_input_embeddings(), merged.get_output_embeddings()
    if head is not None and head.weight is not embedding.weight:
        # They may have been tied in the base, but one of the two was trained in full.
        merged.config.get_text_config().tie_word_embeddings = merged.config.tie_word_embeddings = (
            False
        )
    with save_errors(output):
        begin_folder(Path(output))
        merged.save_pretrained(output)
        if tokenizer is not None:
            tokenizer.save_pretrained(output)
        seal_checkpoint(os.fspath(output))


def _copy_vocabulary(trained: Any, model: Any) -> None:
    """Give a model the rows of the embedding and the end tokens of a trained one."""
    rows = int(trained.get_input_embeddings().weight.shape[0])
    if rows != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows)
    end = trained.config.get_text_config().eos_token_id
    model.config.get_text_config().eos_token_id = end
    if trained.can_generate():
        model.generation_config.eos_token_id = trained.generation_config.eos_token_id


def _add_new_tokens(model: Any, peft_config: Any, new: list[int]) -> Any:
    """Add new rows to the configuration, for the embedding and an untied head.

    The rows are trained.
    """
    if not new or not hasattr(peft_config, "trainable_token_indices"):
        return peft_config
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [embedding]
    if head is not None and head.weight is not embedding.weight:
        if getattr(head, "bias", None) is None:
            layers.append(head)
        else:  # peft's layer for selected rows omits the bias, which would change the model
            logger.warning(
                "the head of %s has a bias, so its rows for %d new tokens are not trained",
                type(model).__name__,
                len(new),
            )
    # The layers by name, without those that the configuration trains completely or adapts.
    names = [name for layer in layers for name, module in model.named_modules() if module is layer]
    trained_in_full = [*(peft_config.modules_to_save or ()), *_adapted_layers(peft_config)]
    names = [name for name in names if not any(_is_named(name, other) for other in trained_in_full)]
    # Join the new rows with those of the configuration, which may be a list for the embedding.
    indices = peft_config.trainable_token_indices or {}
    if not isinstance(indices, dict):
        embedding_name = next(n for n, module in model.named_modules() if module is embedding)
        indices = {embedding_name: list(indices)}
    rows = dict(indices)
    for name in names:
        key = next((key for key in rows if _is_named(name, key)), name)
        rows[key] = sorted({*rows.get(key, ()), *new})
    peft_config = copy.copy(peft_config)
    peft_config.trainable_token_indices = rows or None
    if names:
        logger.info(
            "the embeddings of %d new tokens are trained too, in %s", len(new), ", ".join(names)
        )
    return peft_config


def _adapted_layers(peft_config: Any) -> list[str]:
    targets = peft_config.target_modules
    return [] if targets is None or isinstance(targets, str) else list(targets)


def _is_named(name: str, reference: str) -> bool:
    """Return whether peft matches `reference` with the layer of this full name."""
    return name == reference or name.endswith(f".{reference}")


def _checkpoint_rows(name: str) -> int | None:
    """Return the rows of a checkpoint's embedding; None if it is not on this machine."""
    if not name:
        return None
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        return None
    size = getattr(config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) else None


def _load_vocabulary(name: str) -> dict[str, int] | None:
    """Return tokens and ids of a checkpoint's own tokenizer.

    The result is None if the tokenizer is not on this machine.
    """
    if not name or (os.path.isdir(name) and not (Path(name) / "tokenizer_config.json").exists()):
        return None
    from transformers import AutoTokenizer

    try:
        vocabulary: dict[str, int] = AutoTokenizer.from_pretrained(
            name, local_files_only=True, trust_remote_code=False
        ).get_vocab()
    except (OSError, ValueError):
        return None
    return vocabulary
