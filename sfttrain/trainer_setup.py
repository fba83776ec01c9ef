"""What a trainer is made of, settled in order before it starts: its settings, the model, the
tokenizer, the datasets."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments, set_seed

from sftprep.errors import ConfigError
from sfttrain.config.attention_names import reject_mixing
from sfttrain.config.model_config import ModelConfig
from sfttrain.config.sft_config import SFTConfig
from sfttrain.config.unsupported import reject_unsupported
from sfttrain.data.inputs import rows_given
from sfttrain.data.once_per_node import Ranks
from sfttrain.data.prepare import DataPreparation, DataSettings, needs_tokenizer
from sfttrain.models.adapters import add_adapter
from sfttrain.models.loading import (
    get_kbit_device_map,
    get_quantization_config,
    is_commit,
    load_model,
)
from sfttrain.models.tokenizer import settle_tokenizer
from sfttrain.models.unwrap import unwrap_peft
from sfttrain.trainer_datasets import TrainerParts, _train_packs, packs_for_evaluation

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
    """Load what is given by name, and prepare what is raw; see `SFTTrainer` for what is taken.

    Raises ConfigError for what does not go together, and the errors of loading a model, a tokenizer
    and of building packs.
    """
    _check_kinds(model, args, processing, peft_config)
    args = to_sft_config(args, model)
    reject_unsupported(args)
    reject_parallelism(args)
    train, evaluation = rows_given(train, "train_dataset"), _each(evaluation, rows_given)
    sets = [train, *(evaluation.values() if isinstance(evaluation, Mapping) else [evaluation])]
    _check_output(args.output_dir, sets)
    # An adapter's first weights are random, and so are the embeddings of new tokens.
    set_seed(args.seed)
    attention = args.attn
    name = str(model) if isinstance(model, (str, os.PathLike)) else ""
    if isinstance(model, (str, os.PathLike)):
        model, attention = _load(
            str(model), args, quantization_config, peft_config, keep_attention=collator is not None
        )
    elif args.model_init_kwargs or quantization_config is not None:
        given = "model_init_kwargs" if args.model_init_kwargs else "quantization_config"
        raise ConfigError(
            f"{given} is for a model given by name, and this one is loaded",
            remedy=f"leave {given} out",
        )
    skipped = isinstance(args.dataset_kwargs, dict) and bool(
        args.dataset_kwargs.get("skip_prepare_dataset")
    )
    raw = not (skipped and collator is not None) and any(
        needs_tokenizer(source, as_they_are=skipped) for source in sets
    )
    tokens = settle_tokenizer(model, processing, args, needed=raw)
    if peft_config is not None:
        model = add_adapter(model, peft_config, tokenizer=tokens.tokenizer)
        _tell_unmatched(model, peft_config)
    preparation = DataPreparation(
        DataSettings.of(args, tokens.tokenizer),
        tokenizer=tokens.tokenizer,
        formatting=formatting,
        ranks=Ranks(args.process_index, args.local_process_index, args.world_size),
        folder=args.dataset_cache_dir,
    )
    parts = TrainerParts(args, model, tokens.processing, None, None, preparation, attention, name)
    if collator is not None:
        from sfttrain.trainer_datasets import rows_for_collator

        parts.train = None if train is None else rows_for_collator(parts, train, "train_dataset")
        parts.evaluation = _each(
            evaluation, lambda source, name: rows_for_collator(parts, source, name)
        )
    else:
        parts.train = None if train is None else _train_packs(parts, train)
        parts.evaluation = _each(
            evaluation, lambda source, name: packs_for_evaluation(parts, source, name)
        )
    return parts


def to_sft_config(args: TrainingArguments | None, model: Any) -> SFTConfig:
    """The settings: those given, or defaults with a folder named after the model."""
    if isinstance(args, SFTConfig):
        return args
    if args is None:
        name = (
            str(model)
            if isinstance(model, (str, os.PathLike))
            else str(getattr(model.config, "_name_or_path", "") or "model")
        )
        return SFTConfig(output_dir=f"{os.path.basename(name.rstrip('/'))}-SFT")
    # Only what was set: the defaults of SFTConfig are others.
    plain = {f.name: f.default for f in dataclasses.fields(args) if f.init}
    given = {
        name: getattr(args, name)
        for name, default in plain.items()
        if getattr(args, name) != default
    }
    return SFTConfig(**given)


def reject_parallelism(args: SFTConfig) -> None:
    """Raise ConfigError for ways to share a row out that packed rows do not survive."""
    if args.n_gpu > 1:
        raise ConfigError(
            f"one process would share its rows out to {args.n_gpu} GPUs, and a packed row cannot be"
            " shared out",
            remedy=(
                f"start a process for each GPU: torchrun --nproc_per_node {args.n_gpu} SCRIPT, or"
                " accelerate launch SCRIPT"
            ),
        )
    parallelism = args.parallelism_config
    for name in ("cp_size", "sp_size"):
        if parallelism is not None and getattr(parallelism, name, 1) > 1:
            raise ConfigError(
                f"{name} is above 1: packed sequences would see each other",
                remedy=f"leave {name} at 1",
            )


def init_options(
    args: SFTConfig, quantization_config: Any, *, keep_attention: bool
) -> tuple[dict[str, Any], str]:
    """Arguments of from_pretrained, model_init_kwargs among them; and the attention that is asked
    for.

    keep_attention: attn_implementation goes to from_pretrained. Raises ConfigError for what is said
    twice.
    """
    assert not isinstance(args.model_init_kwargs, str)
    options: dict[str, Any] = dict(args.model_init_kwargs or {})
    if "torch_dtype" in options:
        dtype = options.pop("torch_dtype")
        if options.setdefault("dtype", dtype) != dtype:
            raise ConfigError(
                "model_init_kwargs has torch_dtype and dtype, which are the same",
                remedy="leave torch_dtype out",
            )
    kind = options.get("dtype")
    if (
        isinstance(kind, str)
        and kind != "auto"
        and not isinstance(getattr(torch, kind, None), torch.dtype)
    ):
        raise ConfigError(
            f"model_init_kwargs: dtype is {kind!r}",
            remedy="give bfloat16, float16, float32 or auto",
        )
    in_bits = {key: options.pop(key) for key in ("load_in_8bit", "load_in_4bit") if key in options}
    if quantization_config is None and any(in_bits.values()):
        quantization_config = get_quantization_config(ModelConfig(use_peft=True, **in_bits))
    if quantization_config is not None:
        if options.get("quantization_config") is not None:
            raise ConfigError(
                "quantization_config is given twice, to the trainer and in model_init_kwargs",
                remedy="give it to the trainer",
            )
        options["quantization_config"] = quantization_config
    if options.get("quantization_config") is not None:
        options.setdefault("device_map", get_kbit_device_map())
    elif args.world_size > 1:
        options["device_map"] = None  # each rank has a device of its own
    attention = args.attn
    wanted = options.get("attn_implementation")
    if wanted is not None and not keep_attention:
        reject_mixing(wanted)
        del options["attn_implementation"]
        attention = wanted if attention == "auto" else attention
    return options, attention


def _check_kinds(model: Any, args: Any, processing: Any, peft_config: Any) -> None:
    """Raise ConfigError for a model, settings, a tokenizer or an adapter that are something
    else."""
    if args is not None and not isinstance(args, TrainingArguments):
        raise ConfigError(
            f"args is a {type(args).__name__}",
            remedy="give an SFTConfig: SFTConfig(output_dir=..., ...)",
        )
    if not isinstance(model, (str, os.PathLike, nn.Module)):
        found = "None" if model is None else f"a {type(model).__name__}"
        raise ConfigError(
            f"model is {found}",
            remedy="give the folder or Hub name of a model, or one that from_pretrained has loaded",
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
                    'give peft.LoraConfig(r=16, target_modules="all-linear"), or another PeftConfig'
                ),
            )
        if peft_config.task_type not in (None, "CAUSAL_LM"):
            raise ConfigError(
                f"peft_config is for the task {str(peft_config.task_type)!r}, and a causal language"
                " model is trained",
                remedy='set task_type="CAUSAL_LM" in it, or leave it out',
            )


def _check_output(folder: str, sets: Sequence[Any]) -> None:
    """Raise ConfigError where the output folder is a file, or in a folder that is trained on: the
    next run would take checkpoints for data."""
    output = Path(folder).expanduser().resolve()
    if output.exists() and not output.is_dir():
        raise ConfigError(
            f"output_dir {folder} is a file", remedy="give a folder, which need not be there yet"
        )
    for source in sets:
        place = getattr(source, "root", source)
        if not isinstance(place, (str, os.PathLike)) or not Path(place).is_dir():
            continue
        data = Path(place).resolve()
        if output == data or data in output.parents:
            raise ConfigError(
                f"output_dir {folder} is in the data {place}", remedy="give a folder of its own"
            )


def _load(
    name: str, args: SFTConfig, quantization_config: Any, peft_config: Any, *, keep_attention: bool
) -> tuple[Any, str]:
    """A model by name, with what model_init_kwargs says of it; and the attention that is asked
    for."""
    options, attention = init_options(args, quantization_config, keep_attention=keep_attention)
    if (
        args.trust_remote_code
        and not os.path.isdir(name)
        and not is_commit(options.get("revision"))
    ):
        logger.warning(
            "code of %s is run as it is today: pin it with model_init_kwargs={'revision': COMMIT}",
            name,
        )
    config = ModelConfig(
        model_name_or_path=name,
        use_peft=peft_config is not None,
        trust_remote_code=args.trust_remote_code,
    )
    return load_model(config, device=args.device, options=options), attention


def _tell_unmatched(model: Any, peft_config: Any) -> None:
    """Warn of layers that were to be trained in full and are not there: peft says nothing of
    them."""
    layers = {name.rpartition(".")[2] for name, _ in unwrap_peft(model).named_modules()}
    for wanted in getattr(peft_config, "modules_to_save", None) or ():
        if wanted.rpartition(".")[2] not in layers:
            near = difflib.get_close_matches(wanted, layers, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            logger.warning(
                "modules_to_save names %r, and the model has no such layer: it is not trained%s",
                wanted,
                hint,
            )


def _each(sets: Any, prepare: Any) -> Any:
    """The evaluation set, or each of several, prepared."""
    if sets is None:
        return None
    if isinstance(sets, Mapping):
        return {name: prepare(source, str(name)) for name, source in sets.items()}
    return prepare(sets, "eval_dataset")
