"""The settings of a run: TrainingArguments with other defaults, and TRL's."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from datetime import timedelta
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from sftprep.config import check_local_path
from sftprep.errors import ConfigError, setting
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
from sfttrain.config.record_settings import RecordSettings
from sfttrain.config.trackers import check_trackers
from sfttrain.config.unsupported import check_choices, check_numbers, reject_unsupported, reject_url

LossImpl = Literal["auto", "logits", "fused"]


class DefaultLength(int):
    """An unspecified `max_length`.

    The trainer uses the limit of the tokenizer instead if it is lower, as TRL used to.
    """


@dataclass
class SFTConfig(RecordSettings, DeprecatedSettings, TrainingArguments):  # type: ignore[misc]
    """TrainingArguments with the settings of TRL 1.16's SFTConfig, and sfttrain's.

    Older names of the settings are accepted too. These defaults differ from TrainingArguments:

    - learning_rate: 2e-5, not 5e-5 (`sfttrain run --use_peft` uses 2e-4 if none is specified);
    - logging_steps: 10, not 500;
    - report_to: none, not every installed tracker;
    - bf16: on for CUDA devices that support it;
    - gradient_checkpointing: on for GPUs only, because memory is not scarce on CPUs;
    - logging_nan_inf_filter: off, because it logs a NaN as a loss of 0 and synchronizes with the
      device at every micro-batch;
    - remove_unused_columns: off.
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "dataset_kwargs",
    ]

    # 1. Fields of TrainingArguments with other defaults. The types are those of TRL's SFTConfig.
    learning_rate: float = field(
        default=2e-5,
        metadata={"help": "The initial learning rate; 2e-4 if not specified with --use_peft."},
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Log every N steps; below 1, a fraction of all steps."}
    )
    # HfArgumentParser requires None to be first in this union.
    report_to: None | str | list[str] = field(  # noqa: RUF036
        default="none", metadata={"help": "Trackers to report to: wandb, tensorboard, ... or none."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave it off: a loss that is not finite stops the run."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Packs have no columns to remove."}
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Mixed precision in bfloat16; by default on if a CUDA device supports it.",
            "nargs": "?",
            "const": True,
        },
    )

    # 2. Fields of TRL's SFTConfig.
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Arguments of from_pretrained, for a model specified by name."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code that comes with the model."}
    )
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={
            "help": (
                "Weight of the loss that balances experts; by default that in the model's config."
            )
        },
    )
    chat_template_path: str | None = field(
        default=None,
        metadata={
            "help": ("A .jinja file, or a tokenizer whose template and special tokens are copied.")
        },
    )
    dataset_text_field: str = field(
        default="text", metadata={"help": "Key of the text in raw records."}
    )
    dataset_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "skip_prepare_dataset: use the dataset without preparing it."},
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that prepare raw records."}
    )
    eos_token: str | None = field(
        default=None,
        metadata={"help": "Token that ends a text or a turn; by default the tokenizer's own."},
    )
    pad_token: str | None = field(
        default=None,
        metadata={"help": "Padding token to save with the tokenizer; rows are not padded."},
    )
    max_length: int | None = field(
        default=DefaultLength(1024),
        metadata={
            "help": "Maximum tokens of a raw record and of a pack; none: records are not cut."
        },
    )
    truncation_mode: str = field(
        default="keep_start",
        metadata={
            "help": "Which end of a longer record is kept.",
            "choices": ["keep_start", "keep_end"],
        },
    )
    shuffle_dataset: bool = field(
        default=False, metadata={"help": "Shuffle raw records before they are packed."}
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
        default=False, metadata={"help": "Has no effect: rows are never padded."}
    )
    pad_to_multiple_of: int | str | None = field(
        default="auto",
        metadata={"help": "Pad rows to a multiple of N tokens; auto: rows are not padded."},
    )
    eval_packing: bool | None = field(
        default=None,
        metadata={
            "help": "Pack raw evaluation records; by default the same as packing.",
            "nargs": "?",
            "const": True,
        },
    )
    completion_only_loss: bool | None = field(
        default=None,
        metadata={
            "help": "Train on completions only; by default if the records have them.",
            "nargs": "?",
            "const": True,
        },
    )
    assistant_only_loss: bool = field(
        default=False, metadata={"help": "Train on the assistant's messages only."}
    )
    loss_type: str = field(
        default="nll",
        metadata={
            "help": (
                "nll: negative log likelihood; dft: each token weighted by its own probability;"
                " chunked_nll: the same as nll."
            ),
            "choices": ["nll", "dft", "chunked_nll"],
        },
    )
    activation_offloading: bool = field(
        default=False, metadata={"help": "Keep activations in CPU memory."}
    )

    # 3. Fields of sfttrain, apart from those of RecordSettings.
    dataset_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of prepared datasets; by default in sftprep's cache."},
    )
    attn: str = field(
        default="auto",
        metadata={
            "help": (
                "Attention over packed rows: auto, flash_attention_4, flash_attention_3,"
                " flash_attention_2, torch_varlen, sft_varlen, or unpack. auto selects the fastest"
                " one that is available and keeps sequences apart; any other is used or refused."
            )
        },
    )
    isolation_guard: bool = field(
        default=True,
        metadata={
            "help": (
                "Before the first step, verify on the model itself that packed sequences cannot"
                " attend to each other."
            )
        },
    )
    loss_impl: LossImpl = field(
        default="auto",
        metadata={
            "help": (
                "logits: computed only where the next token is trained; fused: never stored; auto:"
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

    @property
    def requested_length(self) -> int | None:
        """The `max_length` that the user set; None if it is the default or no limit."""
        length = self.max_length
        return None if length is None or isinstance(length, DefaultLength) else int(length)

    def __post_init__(self) -> None:
        drop_empty_variables()
        self.check_records()
        for name in ("output_dir", "dataset_cache_dir"):
            check_local_path(str(getattr(self, name) or ""), setting(name))
        reject_url(self.chat_template_path, "chat_template_path")
        if launched_ranks() > 1 and not torch.accelerator.is_available():
            self.use_cpu = True  # otherwise every rank would become a run of its own
        on_cuda = torch.cuda.is_available() and not self.use_cpu
        if self.bf16 is None:
            self.bf16 = on_cuda and not self.fp16 and torch.cuda.is_bf16_supported()
        if self.bf16 and not torch.accelerator.is_available():
            self.use_cpu = True  # Trainer refuses bfloat16 on a CPU unless use_cpu is set
        self._set_activation_checkpointing(on_cuda)
        apply_deprecated_settings(self)
        check_numbers(self)
        reject_mixing(self.attn)
        check_choices(self)
        reject_unsupported(self)
        self._join_run()
        check_trackers(list(self.report_to or ()))
        for name in ("model_init_kwargs", "dataset_kwargs"):
            if isinstance(getattr(self, name), str):
                raise ConfigError(
                    f"{setting(name)} is {getattr(self, name)!r}, which is not a JSON object",
                    remedy='write {"name": value}',
                )

    def _join_run(self) -> None:
        """Run the set-up of TrainingArguments, with typed errors for failed launches.

        It creates the process group, among other things.
        """
        unmet = unmet_launch(str(self.output_dir))  # before accelerate sets some of the variables
        awaited = is_group_awaited()
        try:
            if awaited:
                report_wait()
            if awaited and self.use_cpu:
                self._create_cpu_group()
            super().__post_init__()
        except (ValueError, RuntimeError) as error:
            if awaited and isinstance(error, torch.distributed.DistError):
                raise missed_launch(self.ddp_timeout) from error
            if unmet is not None:
                raise unmet from error  # torch or accelerate complained about its variables
            raise
        if self.world_size == 1 and launched_ranks() > 1:
            raise refused_launch(str(self.output_dir), launcher_variables())

    def _create_cpu_group(self) -> None:
        """Create the process group with ddp_timeout.

        transformers applies ddp_timeout to GPUs only.
        """
        from accelerate import PartialState

        timeout = timedelta(seconds=self.ddp_timeout)
        PartialState(cpu=True, backend=self.ddp_backend, timeout=timeout)

    def _set_activation_checkpointing(self, on_cuda: bool) -> None:
        """Switch activation checkpointing on for GPUs, unless it was specified.

        The argument was renamed in transformers 5.2x; the one that exists is set.
        """
        name = (
            "activation_checkpointing"
            if "activation_checkpointing" in {f.name for f in fields(self)}
            else "gradient_checkpointing"
        )
        if getattr(self, name) is None and getattr(self, "gradient_checkpointing", None) is None:
            setattr(self, name, on_cuda)
