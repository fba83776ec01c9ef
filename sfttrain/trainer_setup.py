"""Resolution of the arguments of SFTTrainer into its parts.

1. Check the types of the arguments and the settings.
2. Load a model that is specified by name.
3. Resolve the tokenizer, and add the adapter.
4. Prepare the datasets.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments, set_seed

from sftprep.errors import ConfigError, setting
from sfttrain.config.attention_names import reject_mixing
from sfttrain.config.model_config import ModelConfig
from sfttrain.config.sft_config import SFTConfig
from sfttrain.config.unsupported import reject_unsupported
from sfttrain.data.inputs import needs_tokenizer, to_row_source
from sfttrain.data.once_per_node import Ranks
from sfttrain.data.prepare import DataPreparation
from sfttrain.data.settings import DataSettings
from sfttrain.models.adapters import add_adapter
from sfttrain.models.loading import (
    get_kbit_device_map,
    get_quantization_config,
    load_model,
)
from sfttrain.models.remote_code import is_commit
from sfttrain.models.tokenizer import resolve_tokenizer
from sfttrain.models.unwrap import unwrap_peft
from sfttrain.trainer_datasets import (
    TrainerParts,
    packs_for_evaluation,
    packs_for_training,
    rows_for_collator,
)

logger = logging.getLogger(__name__)


def resolve_trainer_parts(
    model: Any,
    args: TrainingArguments | None,
    *,
    train: Any,
    evaluation: Any,
    processing: Any,
    quantization_config: Any,
    peft_config: Any,
    formatting: Any,
    collator: Any,
) -> TrainerParts:
    """Load the model, and prepare the datasets; `SFTTrainer` describes the arguments.

    Raises:
        ConfigError: The arguments contradict each other.
        SftprepError: The model or the tokenizer cannot be loaded, or the data cannot be prepared.
    """
    # 1. Check the arguments.
    _check_types(model, args, processing, peft_config)
    args = to_sft_config(args, model)
    reject_unsupported(args)
    reject_parallelism(args)
    train, evaluation = to_row_source(train, "train_dataset"), _map_sets(to_row_source, evaluation)
    sets = [train, *(evaluation.values() if isinstance(evaluation, Mapping) else [evaluation])]
    _check_output_folder(args.output_dir, sets)
    # 2. Load the model. The first weights of an adapter and the embeddings of new tokens are
    #    random, so the seed is set before.
    set_seed(args.seed)
    name = str(model) if isinstance(model, (str, os.PathLike)) else ""
    model, attention = _resolve_model(
        model, args, quantization_config, peft_config, keep_attention=collator is not None
    )
    # 3. Resolve the tokenizer, which only raw records need.
    is_skipped = isinstance(args.dataset_kwargs, dict) and bool(
        args.dataset_kwargs.get("skip_prepare_dataset")
    )
    is_needed = not (is_skipped and collator is not None) and any(
        needs_tokenizer(source, skip_prepare=is_skipped) for source in sets
    )
    tokens = resolve_tokenizer(model, processing, args, sets, needed=is_needed)
    if peft_config is not None:
        model = add_adapter(model, peft_config, tokenizer=tokens.tokenizer)
        _warn_of_missing_layers(model, peft_config)
    # 4. Prepare the datasets.
    preparation = DataPreparation(
        DataSettings.from_config(args, tokens.tokenizer),
        tokenizer=tokens.tokenizer,
        formatting=formatting,
        ranks=Ranks(args.process_index, args.local_process_index, args.world_size),
        folder=args.dataset_cache_dir,
    )
    parts = TrainerParts(args, model, tokens.processing, None, None, preparation, attention, name)
    if collator is not None:
        parts.train = None if train is None else rows_for_collator(parts, train, "train_dataset")
        parts.evaluation = _map_sets(partial(rows_for_collator, parts), evaluation)
    else:
        parts.train = None if train is None else packs_for_training(parts, train)
        parts.evaluation = _map_sets(partial(packs_for_evaluation, parts), evaluation)
    return parts


def to_sft_config(args: TrainingArguments | None, model: Any) -> SFTConfig:
    """Convert the settings to an SFTConfig.

    By default, it has a folder named after the model.

    Args:
        args: An SFTConfig, TrainingArguments, or None.
        model: The model or its name.
    """
    if isinstance(args, SFTConfig):
        return args
    if args is None:
        name = (
            str(model)
            if isinstance(model, (str, os.PathLike))
            else str(getattr(model.config, "_name_or_path", "") or "model")
        )
        return SFTConfig(output_dir=f"{os.path.basename(name.rstrip('/'))}-SFT")
    # SFTConfig has other defaults, so only the specified values are copied.
    defaults = {f.name: f.default for f in dataclasses.fields(args) if f.init}
    specified = {
        name: getattr(args, name)
        for name, default in defaults.items()
        if getattr(args, name) != default
    }
    return SFTConfig(**specified)


def reject_parallelism(args: SFTConfig) -> None:
    """Refuse to split packed rows for parallelism.

    Raises:
        ConfigError: One process has several GPUs, or a row would be split over several processes.
    """
    if args.n_gpu > 1:
        raise ConfigError(
            f"one process would distribute its rows over {args.n_gpu} GPUs, but a packed row cannot"
            " be split",
            remedy=(
                f"start a process for each GPU: torchrun --nproc_per_node {args.n_gpu} SCRIPT, or"
                " accelerate launch SCRIPT"
            ),
        )
    parallelism = args.parallelism_config
    for name in ("cp_size", "sp_size"):
        if parallelism is not None and getattr(parallelism, name, 1) > 1:
            raise ConfigError(
                f"{name} is above 1: packed sequences would attend to each other",
                remedy=f"leave {name} at 1",
            )


def init_options(
    args: SFTConfig, quantization_config: Any, *, keep_attention: bool
) -> tuple[dict[str, Any], str]:
    """Return the arguments of from_pretrained, and the requested attention.

    Args:
        args: The settings, of which `model_init_kwargs` are arguments.
        quantization_config: The quantization; None for that in `model_init_kwargs`, or none.
        keep_attention: Whether attn_implementation is passed to from_pretrained, as for a collator.
            Otherwise sfttrain applies it.

    Raises:
        ConfigError: An argument is specified twice, or the dtype is unknown.

    Example:
        model_init_kwargs={"torch_dtype": "bfloat16", "attn_implementation": "sft_varlen"}
            ->  {"dtype": "bfloat16"}, "sft_varlen"
    """
    assert not isinstance(args.model_init_kwargs, str)
    options: dict[str, Any] = dict(args.model_init_kwargs or {})
    if "torch_dtype" in options:
        dtype = options.pop("torch_dtype")
        if options.setdefault("dtype", dtype) != dtype:
            raise ConfigError(
                f"{setting('model_init_kwargs')} has torch_dtype and dtype, which are the same",
                remedy="leave torch_dtype out",
            )
    dtype = options.get("dtype")
    if (
        isinstance(dtype, str)
        and dtype != "auto"
        and not isinstance(getattr(torch, dtype, None), torch.dtype)
    ):
        raise ConfigError(
            f"{setting('model_init_kwargs')}: dtype is {dtype!r}",
            remedy="use bfloat16, float16, float32 or auto",
        )
    # Older versions of transformers accepted these two as arguments of from_pretrained.
    in_bits = {key: options.pop(key) for key in ("load_in_8bit", "load_in_4bit") if key in options}
    if quantization_config is None and any(in_bits.values()):
        quantization_config = get_quantization_config(ModelConfig(use_peft=True, **in_bits))
    if quantization_config is not None:
        if options.get("quantization_config") is not None:
            raise ConfigError(
                "quantization_config is specified twice, for the trainer and in"
                f" {setting('model_init_kwargs')}",
                remedy="pass it to the trainer only",
            )
        options["quantization_config"] = quantization_config
    if options.get("quantization_config") is not None:
        options.setdefault("device_map", get_kbit_device_map())
    elif args.world_size > 1:
        options["device_map"] = None  # each rank has a device of its own
    attention = args.attn
    requested = options.get("attn_implementation")
    if requested is not None and not keep_attention:
        reject_mixing(requested)
        del options["attn_implementation"]
        attention = requested if attention == "auto" else attention
    return options, attention


def _check_types(model: Any, args: Any, processing: Any, peft_config: Any) -> None:
    """Raise ConfigError for an argument of a wrong type.

    The arguments are the model, the settings, the tokenizer and the adapter.
    """
    if args is not None and not isinstance(args, TrainingArguments):
        raise ConfigError(
            f"args is a {type(args).__name__}",
            remedy="pass an SFTConfig: SFTConfig(output_dir=..., ...)",
        )
    if not isinstance(model, (str, os.PathLike, nn.Module)):
        found = "None" if model is None else f"a {type(model).__name__}"
        raise ConfigError(
            f"model is {found}",
            remedy="pass the folder or Hub name of a model, or a model that from_pretrained loaded",
        )
    if isinstance(processing, (str, os.PathLike)):
        raise ConfigError(
            f"processing_class is {os.fspath(processing)!r}, a name",
            remedy=f"load it: AutoTokenizer.from_pretrained({os.fspath(processing)!r})",
        )
    if peft_config is not None:
        from peft import PeftConfig

        if not isinstance(peft_config, PeftConfig):
            raise ConfigError(
                f"peft_config is a {type(peft_config).__name__}",
                remedy=(
                    'pass peft.LoraConfig(r=16, target_modules="all-linear"), or another PeftConfig'
                ),
            )
        if peft_config.task_type not in (None, "CAUSAL_LM"):
            raise ConfigError(
                f"peft_config is for the task {str(peft_config.task_type)!r}, but a causal language"
                " model is trained",
                remedy='set its task_type="CAUSAL_LM", or leave task_type out',
            )


def _check_output_folder(folder: str, sets: Sequence[Any]) -> None:
    """Raise ConfigError if the output folder is a file, or in training data.

    In the latter case, the next run would read checkpoints as data.
    """
    output = Path(folder).expanduser().resolve()
    if output.exists() and not output.is_dir():
        raise ConfigError(
            f"{setting('output_dir')} {folder} is a file",
            remedy="specify a folder, which need not exist",
        )
    for source in sets:
        path = getattr(source, "root", source)
        if not isinstance(path, (str, os.PathLike)) or not Path(path).is_dir():
            continue
        data = Path(path).resolve()
        if output == data or data in output.parents:
            raise ConfigError(
                f"{setting('output_dir')} {folder} is in the data {path}",
                remedy="specify a folder outside the data",
            )


def _resolve_model(
    model: Any, args: SFTConfig, quantization_config: Any, peft_config: Any, *, keep_attention: bool
) -> tuple[Any, str]:
    """Load a model specified by name, with the arguments in model_init_kwargs.

    Returns:
        The model, and the requested attention.
    """
    if not isinstance(model, (str, os.PathLike)):
        if args.model_init_kwargs:
            raise ConfigError(
                f"{setting('model_init_kwargs')} is for a model that is specified by name, but this"
                " one is loaded",
                remedy=f"leave {setting('model_init_kwargs')} out",
            )
        if quantization_config is not None:
            raise ConfigError(
                "quantization_config is for a model that is specified by name, but this one is"
                " loaded",
                remedy="leave quantization_config out",
            )
        return model, args.attn
    name = str(model)
    options, attention = init_options(args, quantization_config, keep_attention=keep_attention)
    if (
        args.trust_remote_code
        and not os.path.isdir(name)
        and not is_commit(options.get("revision"))
    ):
        logger.warning(
            "the current code of %s is run: pin it with model_init_kwargs={'revision': COMMIT}",
            name,
        )
    config = ModelConfig(
        model_name_or_path=name,
        use_peft=peft_config is not None,
        trust_remote_code=args.trust_remote_code,
    )
    return load_model(config, device=args.device, options=options), attention


def _warn_of_missing_layers(model: Any, peft_config: Any) -> None:
    """Warn of layers in modules_to_save missing in the model; peft ignores them."""
    layers = {name.rpartition(".")[2] for name, _ in unwrap_peft(model).named_modules()}
    for layer in getattr(peft_config, "modules_to_save", None) or ():
        if layer.rpartition(".")[2] not in layers:
            near = difflib.get_close_matches(layer, layers, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            logger.warning(
                "modules_to_save has %r, but the model has no such layer: it is not trained%s",
                *(layer, hint),
            )


def _map_sets(prepare: Callable[[Any, str], Any], sets: Any) -> Any:
    """Return the prepared evaluation set, or a dictionary of several prepared sets.

    Args:
        prepare: Takes a set and its name for messages.
        sets: A set, a mapping of names to sets, or None.
    """
    if sets is None:
        return None
    if isinstance(sets, Mapping):
        return {name: prepare(source, str(name)) for name, source in sets.items()}
    return prepare(sets, "eval_dataset")
