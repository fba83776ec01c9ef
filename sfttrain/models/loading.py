"""Model of a run: loading, quantization, and a check against the shards."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from sftprep.errors import (
    ConfigError,
    InputNotFound,
    MismatchError,
    MissingDependency,
    first_line,
    setting,
)
from sfttrain.config.model_config import ModelConfig
from sfttrain.data.packs import PackSource, longest_sequence
from sfttrain.models.remote_code import (
    check_code_references,
    check_kernel_references,
    reject_revision_of_folder,
)


class ManifestLike(Protocol):
    """The part of a build's manifest used for training."""

    @property
    def max_length(self) -> int:
        """Largest length of a pack in tokens."""
        ...

    @property
    def tokenizer(self) -> dict[str, Any]:
        """Facts of the tokenizer of the shards.

        They are name, fingerprint, vocab_size, max_id (largest id in the shards), eos_token_id and
        pad_token_id; and `added`, the tokens that the build added to it, if there are any.
        """
        ...

    @property
    def chat_template(self) -> str | None:
        """Chat template of the build; None if it used none."""
        ...


class ShardsLike(PackSource, Protocol):
    """Packs with their manifest."""

    @property
    def manifest(self) -> ManifestLike:
        """The manifest of the build."""
        ...


def load_model(
    config: ModelConfig, *, device: torch.device, options: Mapping[str, Any] | None = None
) -> Any:
    """Load a causal language model.

    Args:
        config: The folder or Hub name of the model, its revision, precision and quantization.
        device: The device of the training, which decides on the default precision.
        options: Further arguments of from_pretrained, which take precedence (model_init_kwargs).

    Raises:
        InputNotFound: If the model does not exist.
        ConfigError: If it is not a causal language model, does not accept an option, or is a folder
            and has a revision.
    """
    from transformers import AutoModelForCausalLM

    name = config.model_name_or_path
    if not name:
        raise ConfigError(
            "no model is specified",
            remedy=f"specify {setting('model_name_or_path', 'FOLDER_OR_NAME')}",
        )
    if _is_path(name) and not Path(name).expanduser().is_dir():
        raise InputNotFound(
            f"the folder {name} does not exist",
            remedy=["check the folder", "specify a name on the Hub such as Qwen/Qwen3-8B"],
        )
    quantization = get_quantization_config(config)
    arguments = {
        "revision": config.model_revision,
        "dtype": _dtype(config, device),
        "trust_remote_code": config.trust_remote_code,
        "quantization_config": quantization,
        "device_map": get_kbit_device_map() if quantization is not None else None,
        **(options or {}),
    }
    reject_revision_of_folder(str(name), arguments["revision"])
    if arguments["trust_remote_code"]:
        check_code_references(str(name), arguments["revision"])
    try:
        subfolder = str(arguments.get("subfolder") or "")
        check_kernel_references(str(name), arguments["revision"], subfolder)
        return AutoModelForCausalLM.from_pretrained(name, **arguments)
    except TypeError as error:  # an unknown option
        raise ConfigError(
            f"{name} cannot be loaded: {first_line(error, 400)}",
            remedy=f"check {setting('model_init_kwargs')}, which is passed to from_pretrained",
        ) from error
    except OSError as error:  # nothing of this name, in a folder or on the Hub
        raise InputNotFound(first_line(error, 400), remedy=_remedy_for_missing(name)) from error
    except ValueError as error:  # the model has no head for language modeling
        raise ConfigError(
            f"{name} cannot be loaded: {first_line(error, 400)}",
            remedy="use a causal language model",
        ) from error


def get_peft_config(config: ModelConfig) -> Any | None:
    """Return the peft.LoraConfig of a ModelConfig; None without use_peft."""
    if not config.use_peft:
        return None
    from peft import LoraConfig

    targets: Any = config.lora_target_modules or "all-linear"
    if not isinstance(targets, str) and len(targets) == 1:
        # peft recognizes "all-linear" only as a string.
        targets = targets[0] if targets[0] == "all-linear" else targets
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        target_parameters=config.lora_target_parameters,
        modules_to_save=config.lora_modules_to_save,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        bias="none",
    )


def get_quantization_config(config: ModelConfig) -> Any | None:
    """Return the BitsAndBytesConfig of a ModelConfig; None without quantization.

    Raises:
        MissingDependency: If bitsandbytes is not installed.
    """
    if not (config.load_in_4bit or config.load_in_8bit):
        return None
    from importlib.util import find_spec

    if find_spec("bitsandbytes") is None:
        raise MissingDependency("bitsandbytes", extra="quant", needed_for="a model in 4 or 8 bits")
    from transformers import BitsAndBytesConfig

    if config.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = config.dtype if config.dtype not in (None, "auto") else "bfloat16"
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=getattr(torch, str(compute)),
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.use_bnb_nested_quant,
        bnb_4bit_quant_storage=config.bnb_4bit_quant_storage,
    )


def get_kbit_device_map() -> dict[str, int] | None:
    """Return the device map of a quantized model: the GPU of this process.

    The result is None without a GPU.
    """
    if not torch.cuda.is_available():
        return None
    from accelerate import PartialState

    return {"": PartialState().local_process_index}


def check_match(
    model: Any, shards: ShardsLike, fingerprint: str | None, allowed: Sequence[str] = ()
) -> list[str]:
    """Check that shards and model belong together.

    Args:
        model: The model.
        shards: The packs, with their manifest.
        fingerprint: The fingerprint of the model's own tokenizer; None if the model has none.
        allowed: Mismatches that are only reported: "tokenizer", "length".

    Returns:
        The allowed mismatches, as texts.

    Raises:
        MismatchError: For a mismatch that is not allowed.
    """
    manifest = shards.manifest
    reported: list[str] = []
    rows = int(model.get_input_embeddings().weight.shape[0])
    largest = int(manifest.tokenizer.get("max_id", -1))
    if largest >= rows:
        raise MismatchError(
            f"the shards have the token id {largest}, but the model's embedding has {rows} rows",
            remedy=(
                "build the shards with the tokenizer of this model: sftprep build ... --tokenizer"
                " MODEL"
            ),
        )
    expected = str(manifest.tokenizer.get("fingerprint", ""))
    if fingerprint is not None and expected and fingerprint != expected:
        reported += _allow_mismatch(
            "tokenizer",
            f"the shards were built with another tokenizer ({manifest.tokenizer.get('name')}) than"
            " the model's own",
            "build them with the tokenizer of this model: sftprep build ... --tokenizer MODEL",
            allowed,
        )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # A pack may be longer than the model's context, because positions restart with each sequence; a
    # sequence may not. The sequences are read only if the limit of the packs does not rule it out.
    if (
        isinstance(context, int)
        and 0 < context < manifest.max_length
        and (longest := longest_sequence(shards)) > context
    ):
        reported += _allow_mismatch(
            "length",
            f"the longest sequence has {longest} tokens, but the model's positions end at"
            f" {context}",
            f"set {setting('max_length', context)} for the preparation of the data",
            allowed,
        )
    return reported


def _allow_mismatch(kind: str, text: str, remedy: str, allowed: Sequence[str]) -> list[str]:
    """Return the text of an allowed mismatch; raise MismatchError for any other."""
    if kind not in allowed:
        allow = f"add {kind} to {setting('allow_mismatch')} to train nevertheless"
        raise MismatchError(text, remedy=[remedy, allow])
    return [text]


def cpu_has_bfloat16() -> bool:
    """Return whether this CPU computes in bfloat16.

    Mixed precision is faster then.

    Older versions of torch do not report the capabilities of the CPU; then the result is False.
    """
    found: dict[str, Any] = dict(getattr(torch.cpu, "get_capabilities", dict)())
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def trainable_share(model: nn.Module) -> tuple[int, int]:
    """Return the number of trained parameters, and of all parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)


def _dtype(config: ModelConfig, device: torch.device) -> Any:
    if config.dtype is not None:
        return "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
    # Full training in 16 bits loses updates that are smaller than the last bit of a weight. The
    # frozen base of an adapter has no updates.
    return "auto" if config.use_peft and device.type != "cpu" else torch.float32


def _remedy_for_missing(name: str) -> str:
    if os.path.isdir(name):
        return "the folder must have a config.json and weights (model.safetensors)"
    return "check the folder, or the name on the Hub and that this machine can reach it"


def _is_path(name: str) -> bool:
    """Return whether a name must be a path.

    Names on the Hub have at most one slash, in the middle.
    """
    return name.startswith(("/", ".", "~")) or name.count("/") > 1
