"""Adapters: put into a model, with the embeddings of new tokens trained beside them, and merged
into it in the end."""

from __future__ import annotations

import copy
import logging
import os
from pathlib import Path
from typing import Any

import torch

from sftprep.errors import ConfigError, TrainingDiverged
from sfttrain.checkpoints.output_folders import reject_to_replace, save_errors
from sfttrain.checkpoints.own_files import begin_folder
from sfttrain.checkpoints.seal import seal_checkpoint
from sfttrain.config.model_config import ModelConfig
from sfttrain.finite import all_tensors, names_not_finite
from sfttrain.models.bnb_cpu import keep_gradients

logger = logging.getLogger(__name__)


def add_adapter(model: Any, peft_config: Any, *, tokenizer: Any | None = None) -> Any:
    """Put an adapter into `model`, and make quantized models ready for it.

    The embeddings of tokens that the checkpoint did not know are trained too (see `new_token_rows`;
    tokenizer: the one that is trained with), and so are their rows of a head that is not tied to
    the embedding: frozen, they would stay as random as they began. `peft_config` itself is not
    changed. Raises ConfigError where the adapter names layers the model does not have, or where the
    model has an adapter already.
    """
    from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training

    if isinstance(model, PeftModel):
        raise ConfigError(
            "the model has an adapter already",
            remedy="leave peft_config out to train that one further",
        )
    if (
        getattr(model, "is_loaded_in_8bit", False)
        and getattr(peft_config, "use_dora", False)
        and model.device.type == "cpu"
    ):
        # Its weight norms lose the scales of the weights at the second forward (peft 0.21).
        raise ConfigError(
            "DoRA does not work over an 8-bit base on a CPU",
            remedy="use --load_in_4bit, or leave --use_dora or --load_in_8bit out",
        )
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        # It freezes all, and keeps norms and head in float32. Checkpointing is the trainer's to
        # switch on.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        keep_gradients(model)
    peft_config = _with_new_tokens(model, peft_config, new_token_rows(model, tokenizer))
    try:
        adapted = get_peft_model(model, peft_config)
    except ValueError as error:
        raise ConfigError(
            f"no adapter can be put into {type(model).__name__}: {_first_line(error)}",
            remedy=_LORA_NAMES,
        ) from error
    # With checkpointing the first layer's input must ask for gradients, or none flow to the
    # adapters behind it.
    adapted.enable_input_require_grads()
    return adapted


def note_new_tokens(model: Any, ids: list[int]) -> None:
    """Write down on a model that its embedding has new rows (clone_chat_template does), for
    `new_token_rows`."""
    model.sft_new_tokens = sorted({*getattr(model, "sft_new_tokens", ()), *ids})


def new_token_rows(model: Any, tokenizer: Any | None = None) -> list[int]:
    """Rows of the embedding that the model's checkpoint has not trained, ascending.

    Those that were noted; those beyond the embedding of the checkpoint, as its config says; and
    those of tokens that `tokenizer` has and the checkpoint's own does not, where the embedding had
    room for them. Where the checkpoint or its tokenizer cannot be found again on this machine, that
    part is left out.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])
    found = set(getattr(model, "sft_new_tokens", ()))
    name = str(getattr(model.config, "_name_or_path", "") or "")
    before = _rows_of_checkpoint(name)
    used = set(range(rows)) if tokenizer is None else set(tokenizer.get_vocab().values())
    if before is not None:
        found |= {row for row in used if row >= before}
    if tokenizer is not None and name and (own := _own_vocabulary(name)) is not None:
        known = set(own.values())
        found |= {number for number in used if number not in known}
    return sorted(row for row in found if row < rows)


def grow_embedding(model: Any, tokenizer: Any, largest: int) -> int:
    """Make room in the embedding for a tokenizer that has more tokens than the model knows; how
    many rows were added.

    largest: the largest id in the shards. Nothing is done where it fits already, or where
    `tokenizer` is another one than the checkpoint's own with tokens added: then their ids mean
    other things, and growing would only hide it.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])
    own = _own_vocabulary(str(getattr(model.config, "_name_or_path", "") or ""))
    theirs = tokenizer.get_vocab()
    if (
        largest < rows
        or own is None
        or any(theirs.get(token) != number for token, number in own.items())
    ):
        return 0
    wanted: int = max(largest, *theirs.values()) + 1
    model.resize_token_embeddings(wanted)
    note_new_tokens(model, list(range(rows, wanted)))
    return wanted - rows


def merge_adapter(
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    base: ModelConfig,
    device: torch.device,
    rows: int | None = None,
    tokenizer: Any | None = None,
) -> None:
    """Merge a saved adapter into its base model, and save a whole model that plain transformers
    loads.

    base: as it was loaded for training, of which a fresh copy is loaded; rows: of the embedding,
    where it had grown; tokenizer: saved beside the model. A quantized base is merged into what its
    weights were while it was trained, in full precision: merging into 4 bits would round the
    adapter away, and the weights before quantization are not those it was trained on. Raises
    TrainingDiverged where the merged model is not finite, OutputExists where `output` has files
    that are not of an earlier merge; nothing is written then.
    """
    from peft import PeftModel

    from sfttrain.models.loading import load_model

    reject_to_replace(Path(output))
    model = load_model(base, device=device)
    if base.load_in_4bit or base.load_in_8bit:
        model = model.dequantize()
    if rows is not None and rows != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows)
    adapted = PeftModel.from_pretrained(model, os.fspath(adapter))
    merged = adapted.merge_and_unload(safe_merge=False)  # all of its tensors are checked here
    if names := names_not_finite(all_tensors(merged)):
        raise TrainingDiverged(
            f"the merged model is not finite ({names[0]}{' and others' if names[1:] else ''}), so"
            f" it is not saved; the adapter is in {os.fspath(adapter)}",
            remedy="check that the base model is finite, and that its --dtype can hold the sum",
        )
    embedding, head = merged.get_input_embeddings(), merged.get_output_embeddings()
    if head is not None and head.weight is not embedding.weight:
        # It may have been tied before: one of the two trained in full is no longer the other.
        merged.config.get_text_config().tie_word_embeddings = merged.config.tie_word_embeddings = (
            False
        )
    with save_errors(output):
        begin_folder(Path(output))
        merged.save_pretrained(output)
        if tokenizer is not None:
            tokenizer.save_pretrained(output)
        seal_checkpoint(os.fspath(output))


_LORA_NAMES = (
    "name layers of this model with --lora_target_modules, or leave it out to take all linear"
    " layers"
)


def _with_new_tokens(model: Any, peft_config: Any, new: list[int]) -> Any:
    """The configuration with these rows to be trained, in the embedding and in a head of its
    own."""
    if not new or not hasattr(peft_config, "trainable_token_indices"):
        return peft_config
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [embedding]
    if head is not None and head.weight is not embedding.weight:
        if getattr(head, "bias", None) is None:
            layers.append(head)
        else:  # peft's layer for chosen rows leaves the bias out, and so would change the model
            logger.warning(
                "%s's head has a bias: its rows for %d new tokens stay as they are",
                type(model).__name__,
                len(new),
            )
    names = [name for layer in layers for name, module in model.named_modules() if module is layer]
    trained_in_full = [*(peft_config.modules_to_save or ()), *_layers_adapted(peft_config)]
    names = [name for name in names if not any(_is_named(name, other) for other in trained_in_full)]
    given = peft_config.trainable_token_indices or {}
    if not isinstance(given, dict):
        given = {
            next(name for name, module in model.named_modules() if module is embedding): list(given)
        }
    rows = dict(given)
    for name in names:
        same = next((key for key in rows if _is_named(name, key)), name)
        rows[same] = sorted({*rows.get(same, ()), *new})
    peft_config = copy.copy(peft_config)
    peft_config.trainable_token_indices = rows or None
    if names:
        logger.info(
            "the embeddings of %d new tokens are trained too, in %s", len(new), ", ".join(names)
        )
    return peft_config


def _layers_adapted(peft_config: Any) -> list[str]:
    targets = peft_config.target_modules
    return [] if targets is None or isinstance(targets, str) else list(targets)


def _is_named(name: str, given: str) -> bool:
    """Whether peft takes `given` for the layer of this full name."""
    return name == given or name.endswith(f".{given}")


def _rows_of_checkpoint(name: str) -> int | None:
    """Rows of the embedding that a checkpoint was saved with; None where it cannot be found on this
    machine."""
    if not name:
        return None
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        return None
    size = getattr(config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) else None


def _own_vocabulary(name: str) -> dict[str, int] | None:
    """Tokens and ids of a checkpoint's own tokenizer; None where it has none on this machine."""
    if not name or (os.path.isdir(name) and not (Path(name) / "tokenizer_config.json").exists()):
        return None
    from transformers import AutoTokenizer

    try:
        found: dict[str, int] = AutoTokenizer.from_pretrained(
            name, local_files_only=True, trust_remote_code=False
        ).get_vocab()
    except (OSError, ValueError):
        return None
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:400]
