"""What a training run is asked to do: transformers' TrainingArguments with defaults for
fine-tuning, and the model's settings."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from datetime import timedelta
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from sftprep.config import check_local_path
from sftprep.errors import ConfigError
from sfttrain.config.attention_names import reject_mixing
from sfttrain.config.deprecated import DeprecatedSettings, apply_deprecated_settings
from sfttrain.config.launchers import (
    drop_empty_variables,
    is_group_awaited,
    launched_ranks,
    launcher_variables,
    missed_launch,
    refused_launch,
    report_wait,
    unmet_launch,
)
from sfttrain.config.unsupported import check_choices, check_numbers, reject_unsupported

LossImpl = Literal["auto", "logits", "fused"]


class DefaultLength(int):
    """A max_length that nobody gave: the trainer takes the tokenizer's own limit where that is
    lower, as TRL used to."""


@dataclass
class SFTConfig(DeprecatedSettings, TrainingArguments):  # type: ignore[misc]
    """TrainingArguments with these other defaults, the settings of TRL's SFTConfig (1.16, and older
    names), and some of ours.

    learning_rate 2e-5 (Trainer: 5e-5; `sfttrain run --use_peft` takes 2e-4 where none is given);
    logging_steps 10 (500); report_to none (all that is installed); bf16 on CUDA devices that have
    it; gradient checkpointing on GPUs (off: on a CPU memory is not what is scarce);
    logging_nan_inf_filter off, since it hides a NaN behind a loss of 0 and waits for the device at
    every micro-batch; remove_unused_columns off.
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "dataset_kwargs",
    ]

    # Fields that TrainingArguments has, with the defaults of this class. Types are those of TRL's
    # SFTConfig.
    learning_rate: float = field(
        default=2e-5,
        metadata={"help": "The initial learning rate; with --use_peft 2e-4 if not given."},
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Log every so many steps; below 1, a share of all steps."}
    )
    # In this order, which HfArgumentParser needs.
    report_to: None | str | list[str] = field(  # noqa: RUF036
        default="none", metadata={"help": "Trackers to report to: wandb, tensorboard, ... or none."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Kept off: a loss that is not finite stops the run."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Packs have no columns to remove."}
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Mixed precision in bfloat16; by default on where a CUDA device has it.",
            "nargs": "?",
            "const": True,
        },
    )

    # Fields of TRL's SFTConfig.
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Arguments of from_pretrained, for a model given by name; torch_dtype is dtype."
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with the model."}
    )
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={
            "help": (
                "Weight of the loss that balances experts; by default that of the model's config."
            )
        },
    )
    chat_template_path: str | None = field(
        default=None,
        metadata={
            "help": (
                "A .jinja file, or a tokenizer whose template and special tokens are taken over."
            )
        },
    )
    dataset_text_field: str = field(
        default="text", metadata={"help": "Key of the text in raw records."}
    )
    dataset_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "skip_prepare_dataset: take the dataset as it is."}
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that prepare raw records."}
    )
    eos_token: str | None = field(
        default=None,
        metadata={"help": "Token that ends a text or a turn, instead of the tokenizer's own."},
    )
    pad_token: str | None = field(
        default=None,
        metadata={"help": "Padding token that is saved with the tokenizer; rows are not padded."},
    )
    max_length: int | None = field(
        default=DefaultLength(1024),
        metadata={
            "help": "Tokens at which raw records are cut, and in a pack; none: records are not cut."
        },
    )
    truncation_mode: str = field(
        default="keep_start",
        metadata={"help": "What is kept of longer records.", "choices": ["keep_start", "keep_end"]},
    )
    shuffle_dataset: bool = field(
        default=False, metadata={"help": "Shuffle raw records before they are packed, too."}
    )
    packing: bool = field(
        default=False, metadata={"help": "Put several raw records into a row of max_length."}
    )
    packing_strategy: str = field(
        default="bfd",
        metadata={
            "help": "How raw records are packed.",
            "choices": ["bfd", "bfd_split", "wrapped"],
        },
    )
    padding_free: bool = field(
        default=False, metadata={"help": "Rows are never padded, whatever is said here."}
    )
    pad_to_multiple_of: int | str | None = field(
        default="auto",
        metadata={
            "help": "Fill rows up to a multiple of so many tokens; auto: they are not filled up."
        },
    )
    eval_packing: bool | None = field(
        default=None,
        metadata={
            "help": "Pack raw evaluation records; by default as packing.",
            "nargs": "?",
            "const": True,
        },
    )
    completion_only_loss: bool | None = field(
        default=None,
        metadata={
            "help": "Train on completions only; by default where there are any.",
            "nargs": "?",
            "const": True,
        },
    )
    assistant_only_loss: bool = field(
        default=False, metadata={"help": "Train on what the assistant says only."}
    )
    loss_type: str = field(
        default="nll",
        metadata={
            "help": (
                "nll: negative log likelihood; dft: each token weighted by its own probability;"
                " chunked_nll is nll."
            ),
            "choices": ["nll", "dft", "chunked_nll"],
        },
    )
    activation_offloading: bool = field(
        default=False, metadata={"help": "Keep activations in the memory of the CPU."}
    )

    # Fields of ours.
    on_bad_record: Literal["error", "quarantine"] = field(
        default="error",
        metadata={
            "help": "What to do with a raw record that cannot be used: error, or quarantine."
        },
    )
    dataset_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder in which raw datasets are kept prepared; by default in sftprep's cache."
        },
    )
    attn: str = field(
        default="auto",
        metadata={
            "help": (
                "Attention over packed rows: auto, flash_attention_4, flash_attention_3,"
                " flash_attention_2, torch_varlen, sft_varlen, or unpack. auto takes the fastest"
                " that is there and keeps sequences apart; another is used or refused."
            )
        },
    )
    isolation_guard: bool = field(
        default=True,
        metadata={
            "help": (
                "Before the first step, prove on the model itself that packed sequences cannot see"
                " each other."
            )
        },
    )
    loss_impl: LossImpl = field(
        default="auto",
        metadata={
            "help": (
                "logits: made only where the next token is trained; fused: never kept at all; auto:"
                " the faster one."
            )
        },
    )
    allow_mismatch: list[str] | None = field(
        default=None,
        metadata={
            "help": (
                "Train although shards and model differ in: tokenizer, length (packs longer than"
                " the model's context)."
            ),
            "choices": ["tokenizer", "length"],
        },
    )

    def __post_init__(self) -> None:
        drop_empty_variables()
        for name in ("output_dir", "dataset_cache_dir"):
            check_local_path(str(getattr(self, name) or ""), name)
        if launched_ranks() > 1 and not torch.accelerator.is_available():
            self.use_cpu = True  # without it, every rank would be a run of its own
        on_cuda = torch.cuda.is_available() and not self.use_cpu
        if self.bf16 is None:
            self.bf16 = on_cuda and not self.fp16 and torch.cuda.is_bf16_supported()
        if self.bf16 and not torch.accelerator.is_available():
            self.use_cpu = True  # Trainer wants it said that bfloat16 on a CPU is meant
        self._checkpoint_activations_on_gpus(on_cuda)
        apply_deprecated_settings(self)
        check_numbers(self)
        reject_mixing(self.attn)
        check_choices(self)
        reject_unsupported(self)
        self._join_run()
        for name in ("model_init_kwargs", "dataset_kwargs"):
            if isinstance(getattr(self, name), str):
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}, no JSON object",
                    remedy='write {"name": value}',
                )

    def _join_run(self) -> None:
        """Set up what transformers does, the process group among it, with our errors."""
        unmet = unmet_launch(str(self.output_dir))  # before accelerate sets some of the variables
        awaited = is_group_awaited()
        try:
            if awaited:
                report_wait()
            if awaited and self.use_cpu:
                self._make_group_of_cpus()
            super().__post_init__()
        except (ValueError, RuntimeError) as error:
            if awaited and isinstance(error, torch.distributed.DistError):
                raise missed_launch(self.ddp_timeout) from error
            if unmet is not None:
                raise unmet from error  # what torch or accelerate says of its variables
            raise
        if self.world_size == 1 and launched_ranks() > 1:
            raise refused_launch(str(self.output_dir), launcher_variables())

    def _make_group_of_cpus(self) -> None:
        """Make the process group with ddp_timeout, which transformers passes on for GPUs only."""
        from accelerate import PartialState

        timeout = timedelta(seconds=self.ddp_timeout)
        PartialState(cpu=True, backend=self.ddp_backend, timeout=timeout)

    def _checkpoint_activations_on_gpus(self, on_cuda: bool) -> None:
        """On by default on GPUs. The argument was renamed in transformers 5.2x; whichever exists is
        set."""
        name = (
            "activation_checkpointing"
            if "activation_checkpointing" in {f.name for f in fields(self)}
            else "gradient_checkpointing"
        )
        if getattr(self, name) is None and getattr(self, "gradient_checkpointing", None) is None:
            setattr(self, name, on_cuda)


@dataclass
class ModelConfig:
    """The model, its precision and its adapter: the fields of TRL's ModelConfig."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Folder of a model, or its name on the Hub.", "aliases": ["--model"]},
    )
    model_revision: str = field(
        default="main", metadata={"help": "Branch, tag or commit on the Hub."}
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": (
                "Precision the weights are loaded in; by default float32 for full training and on"
                " CPUs, and that of the checkpoint for an adapter on a GPU; auto: that of the"
                " checkpoint."
            ),
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with the model."}
    )
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter, not the model."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(
        default=32,
        metadata={"help": "Scale of the adapter: its output is multiplied by alpha / r."},
    )
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapter."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": (
                "Layers that get an adapter, by name; by default all linear layers but the head."
            )
        },
    )
    lora_target_parameters: list[str] | None = field(
        default=None,
        metadata={
            "help": (
                "Parameters that get an adapter, by name, such as the fused experts of MoE layers."
            )
        },
    )
    lora_modules_to_save: list[str] | None = field(
        default=None,
        metadata={
            "help": (
                "Layers that are trained in full beside the adapter, such as embed_tokens and"
                " lm_head."
            )
        },
    )
    lora_task_type: str = field(
        default="CAUSAL_LM",
        metadata={"help": "Kept for TRL's scripts; only CAUSAL_LM is trained here."},
    )
    use_rslora: bool = field(
        default=False, metadata={"help": "Scale the adapter by alpha / sqrt(r)."}
    )
    use_dora: bool = field(
        default=False, metadata={"help": "Train magnitude and direction apart (DoRA)."}
    )
    merge: bool = field(
        default=False,
        metadata={
            "help": (
                "After training, save the model with the adapter merged into it too:"
                " OUTPUT_DIR/merged."
            )
        },
    )
    load_in_8bit: bool = field(
        default=False,
        metadata={"help": "Keep the base model in 8 bits (bitsandbytes); for adapters."},
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "Keep the base model in 4 bits (bitsandbytes); for adapters."},
    )
    bnb_4bit_quant_type: str = field(
        default="nf4", metadata={"help": "Kind of 4-bit numbers.", "choices": ["fp4", "nf4"]}
    )
    use_bnb_nested_quant: bool = field(
        default=False, metadata={"help": "Quantize the 4-bit scales too."}
    )
    bnb_4bit_quant_storage: str | None = field(
        default=None, metadata={"help": "Type in which 4-bit weights are stored."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "As --attn, which wins; kept for TRL's scripts."}
    )
    torch_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Old name of --dtype.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )

    def __post_init__(self) -> None:
        if self.load_in_8bit and self.load_in_4bit:
            raise ConfigError(
                "load_in_8bit and load_in_4bit are both set", remedy="choose one of them"
            )
        if (self.load_in_8bit or self.load_in_4bit) and not self.use_peft:
            raise ConfigError(
                "a quantized model cannot be trained in full", remedy="add --use_peft"
            )
        if self.merge and not self.use_peft:
            raise ConfigError(
                "merge is set, and there is no adapter to merge",
                remedy="add --use_peft, or leave --merge out",
            )
        if self.lora_task_type != "CAUSAL_LM":
            raise ConfigError(
                f"lora_task_type is {self.lora_task_type!r}", remedy="leave it at CAUSAL_LM"
            )
        if self.lora_r < 1:
            raise ConfigError(f"lora_r is {self.lora_r}", remedy="give --lora_r 1 or more")
        if not (math.isfinite(self.lora_dropout) and 0 <= self.lora_dropout <= 1):
            raise ConfigError(
                f"lora_dropout is {self.lora_dropout}", remedy="give a number from 0 to 1"
            )
        if self.torch_dtype is not None and self.dtype is None:
            self.dtype = self.torch_dtype
        elif self.torch_dtype is None:
            self.torch_dtype = self.dtype


def settings_of(kind: Any) -> dict[str, Any]:
    """Names and defaults of the settings in a dataclass."""
    return {f.name: f.default for f in fields(kind) if f.init}
