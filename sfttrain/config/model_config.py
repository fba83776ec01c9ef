"""The settings of the model of a run: precision, adapter and quantization."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from sftprep.errors import ConfigError, setting
from sfttrain.config.unsupported import reject_url


@dataclass
class ModelConfig:
    """The model, its precision and its adapter.

    The fields are those of TRL's ModelConfig, and `merge`.
    """

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
                "Precision of the loaded weights; by default float32 for full training and on CPUs,"
                " and that of the checkpoint for an adapter on a GPU; auto: that of the checkpoint."
            ),
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code that comes with the model."}
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
                "Layers that get an adapter, by name; by default all linear layers except the head."
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
                "Layers that are trained in full alongside the adapter, such as embed_tokens and"
                " lm_head."
            )
        },
    )
    lora_task_type: str = field(
        default="CAUSAL_LM",
        metadata={"help": "For compatibility with TRL; only CAUSAL_LM is supported."},
    )
    use_rslora: bool = field(
        default=False, metadata={"help": "Scale the adapter by alpha / sqrt(r)."}
    )
    use_dora: bool = field(
        default=False, metadata={"help": "Train magnitude and direction separately (DoRA)."}
    )
    merge: bool = field(
        default=False,
        metadata={
            "help": (
                "After training, also save the model with the adapter merged into it, in"
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
        default="nf4", metadata={"help": "Format of the 4-bit numbers.", "choices": ["fp4", "nf4"]}
    )
    use_bnb_nested_quant: bool = field(
        default=False, metadata={"help": "Also quantize the scales of the 4-bit numbers."}
    )
    bnb_4bit_quant_storage: str | None = field(
        default=None, metadata={"help": "Data type in which 4-bit weights are stored."}
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "The same as --attn, which takes precedence; for compatibility with TRL."
        },
    )
    torch_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Old name of --dtype.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )

    def __post_init__(self) -> None:
        reject_url(self.model_name_or_path, "model_name_or_path")
        if self.load_in_8bit and self.load_in_4bit:
            raise ConfigError(
                f"{setting('load_in_8bit')} and {setting('load_in_4bit')} are both set",
                remedy="choose one of them",
            )
        if (self.load_in_8bit or self.load_in_4bit) and not self.use_peft:
            raise ConfigError(
                "a quantized model cannot be trained in full",
                remedy=f"add {setting('use_peft', True)}",
            )
        if self.merge and not self.use_peft:
            raise ConfigError(
                f"{setting('merge')} is set, but there is no adapter to merge",
                remedy=[f"add {setting('use_peft', True)}", f"leave {setting('merge')} out"],
            )
        if self.lora_task_type != "CAUSAL_LM":
            raise ConfigError(
                f"{setting('lora_task_type')} is {self.lora_task_type!r}",
                remedy="leave it at CAUSAL_LM",
            )
        if self.lora_r < 1:
            raise ConfigError(
                f"{setting('lora_r')} is {self.lora_r}", remedy="specify a number of at least 1"
            )
        if not (math.isfinite(self.lora_dropout) and 0 <= self.lora_dropout <= 1):
            raise ConfigError(
                f"{setting('lora_dropout')} is {self.lora_dropout}",
                remedy="specify a number from 0 to 1",
            )
        if self.torch_dtype is not None and self.dtype is None:
            self.dtype = self.torch_dtype
        elif self.torch_dtype is None:
            self.torch_dtype = self.dtype
