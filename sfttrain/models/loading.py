"""The model of a run: loaded, quantized, checked against the shards."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

import sftprep
from sftprep.errors import (
    ConfigError,
    InputNotFound,
    MismatchError,
    MissingDependency,
    TokenizerError,
)
from sfttrain.config.model_config import ModelConfig
from sfttrain.data.packs import PackSource, longest_sequence


class ManifestLike(Protocol):
    """What training reads of a build's manifest."""

    @property
    def max_length(self) -> int:
        """Tokens a pack may have."""
        ...

    @property
    def tokenizer(self) -> dict[str, Any]:
        """name, fingerprint, vocab_size, max_id (largest id in the shards), eos_token_id,
        pad_token_id"""
        ...

    @property
    def chat_template(self) -> str | None:
        """Template that the shards were made with, where there was one."""
        ...


class ShardsLike(PackSource, Protocol):
    """Packs with their manifest."""

    @property
    def manifest(self) -> ManifestLike:
        """What the build says of itself."""
        ...


def load_model(
    config: ModelConfig, *, device: torch.device, options: Mapping[str, Any] | None = None
) -> Any:
    """Load a causal language model by folder or Hub name, in the precision that `config.dtype` says
    (see ModelConfig).

    options: further arguments of from_pretrained, which win (model_init_kwargs). Raises
    InputNotFound where there is no such model, ConfigError where it is no causal language model, or
    takes no such option.
    """
    from transformers import AutoModelForCausalLM

    name = config.model_name_or_path
    if not name:
        raise ConfigError("no model was given", remedy="add --model FOLDER_OR_NAME")
    if _is_path(name) and not Path(name).expanduser().is_dir():
        raise InputNotFound(
            f"there is no folder {name}",
            remedy="check the folder, or give a name on the Hub such as Qwen/Qwen3-8B",
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
    try:
        return AutoModelForCausalLM.from_pretrained(name, **arguments)
    except TypeError as error:
        raise ConfigError(
            f"{name} cannot be loaded: {_first_line(error)}",
            remedy="look at model_init_kwargs: it goes to from_pretrained",
        ) from error
    except OSError as error:
        raise InputNotFound(_first_line(error), remedy=_remedy_for_missing(name)) from error
    except ValueError as error:
        raise ConfigError(
            f"{name} cannot be loaded: {_first_line(error)}", remedy="give a causal language model"
        ) from error


def check_code_is_pinned(config: ModelConfig) -> None:
    """Check that code of a repository, where it is to be run, is that of a commit.

    A branch or tag may lead to other code tomorrow.

    Raises:
        ConfigError: --trust_remote_code without a commit.
    """
    name = str(config.model_name_or_path)
    if (
        config.trust_remote_code
        and not os.path.isdir(name)
        and not is_commit(config.model_revision)
    ):
        raise ConfigError(
            f"--trust_remote_code would run code of {name} at {config.model_revision}, which may"
            " change",
            remedy="read the code, and give its commit: --model_revision COMMIT (40 hex digits)",
        )


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a whole commit id."""
    return re.fullmatch(r"[0-9a-f]{40}", revision or "") is not None


def code_that_runs(config: ModelConfig) -> str:
    """Name the code that --trust_remote_code allows: repository@commit, or folder; else ''."""
    if not config.trust_remote_code:
        return ""
    name = str(config.model_name_or_path)
    return os.path.abspath(name) if os.path.isdir(name) else f"{name}@{config.model_revision}"


def get_peft_config(config: ModelConfig) -> Any | None:
    """The peft.LoraConfig that a ModelConfig asks for, or None without use_peft."""
    if not config.use_peft:
        return None
    from peft import LoraConfig

    targets: Any = config.lora_target_modules or "all-linear"
    if not isinstance(targets, str) and len(targets) == 1:
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
    """The BitsAndBytesConfig that a ModelConfig asks for, or None. Raises MissingDependency without
    bitsandbytes."""
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
    """Where a quantized model goes: the GPU of this process, or None on machines without one."""
    if not torch.cuda.is_available():
        return None
    from accelerate import PartialState

    return {"": PartialState().local_process_index}


def check_match(
    model: Any, shards: ShardsLike, fingerprint: str | None, allowed: Sequence[str] = ()
) -> list[str]:
    """Check that shards and model belong together, before anything is trained.

    fingerprint: that of the model's own tokenizer, None where the model has none. allowed:
    mismatches that are only told, of tokenizer and length. Returns what was told. Raises
    MismatchError.
    """
    manifest = shards.manifest
    told: list[str] = []
    rows = int(model.get_input_embeddings().weight.shape[0])
    largest = int(manifest.tokenizer.get("max_id", -1))
    if largest >= rows:
        raise MismatchError(
            f"the shards hold token id {largest}, and the model's embedding has {rows} rows",
            remedy=(
                "build the shards with the tokenizer of this model: sftprep build ... --tokenizer"
                " MODEL"
            ),
        )
    theirs = str(manifest.tokenizer.get("fingerprint", ""))
    if fingerprint is not None and theirs and fingerprint != theirs:
        text = (
            f"the shards were built with another tokenizer ({manifest.tokenizer.get('name')}) than"
            " the model's own"
        )
        if "tokenizer" not in allowed:
            raise MismatchError(
                text,
                remedy=(
                    "build them with --tokenizer MODEL, or train all the same with --allow_mismatch"
                    " tokenizer"
                ),
            )
        told.append(text)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # Packs may well be longer than the model's context, since positions restart: sequences may not.
    # Only then are they looked at.
    if (
        isinstance(context, int)
        and 0 < context < manifest.max_length
        and (longest := longest_sequence(shards)) > context
    ):
        text = (
            f"the longest sequence has {longest} tokens, and the model's positions end at {context}"
        )
        if "length" not in allowed:
            raise MismatchError(
                text,
                remedy=(
                    f"build with --max-length {context}, or train all the same with"
                    " --allow_mismatch length"
                ),
            )
        told.append(text)
    return told


def tokenizer_for(
    config: ModelConfig, manifest: ManifestLike, allowed: Sequence[str] = ()
) -> tuple[Any | None, str | None]:
    """Load the tokenizer to save with the model; its template and end token are the shards'.

    It is the model's own if it has one, else the one that the shards name. `trust_remote_code` is
    about the model, which the user named: code of a tokenizer that a manifest names is never run.

    Args:
        config: the model.
        manifest: of the shards.
        allowed: mismatches that are accepted, as in `check_match`. If "tokenizer" is among them,
            the tokenizer of the shards is preferred.

    Returns:
        The tokenizer and the fingerprint of the model's own; None where there is none.
    """
    theirs = str(manifest.tokenizer.get("fingerprint", ""))
    own = _load_tokenizer(
        str(config.model_name_or_path),
        revision=config.model_revision,
        trust_remote_code=config.trust_remote_code,
    )
    fingerprint = _fingerprint(own, manifest) if own is not None else None
    tokenizer = own
    differs = bool(theirs) and fingerprint != theirs
    if own is None or (differs and (fingerprint is None or "tokenizer" in allowed)):
        tokenizer = _load_tokenizer(str(manifest.tokenizer.get("name") or "")) or own
    if tokenizer is not None:
        # Inference must write its prompts, and know the end of an answer, as the shards did.
        if manifest.chat_template is not None:
            tokenizer.chat_template = manifest.chat_template
        end = manifest.tokenizer.get("eos_token_id")
        if end is not None and end != tokenizer.eos_token_id and int(end) < len(tokenizer):
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(int(end))
    return tokenizer, fingerprint


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies in bfloat16, so that mixed precision pays; False where torch
    cannot tell, as older ones."""
    found: dict[str, Any] = dict(getattr(torch.cpu, "get_capabilities", dict)())
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def trainable_share(model: nn.Module) -> tuple[int, int]:
    """Parameters that are trained, and all of them."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)


def _fingerprint(tokenizer: Any, manifest: ManifestLike) -> str | None:
    """Fingerprint of a tokenizer, with the end token of the shards (`sftprep build --eos-token`);
    None if it has none."""
    try:
        spec = sftprep.tokenizer_spec(tokenizer)
        end = manifest.tokenizer.get("eos_token_id")
        if end is not None and end != spec.eos_token_id and int(end) < spec.vocab_size:
            spec = spec.with_eos(str(tokenizer.convert_ids_to_tokens(int(end))))
    except TokenizerError:
        return None  # of a kind that sftprep cannot read, so no shards were built with it
    return str(spec.fingerprint)


def _dtype(config: ModelConfig, device: torch.device) -> Any:
    if config.dtype is not None:
        return "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
    # Full training in 16 bits loses updates smaller than a weight's last bit; a frozen base loses
    # nothing.
    return "auto" if config.use_peft and device.type != "cpu" else torch.float32


def _load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Any | None:
    """Load a transformers tokenizer; None where `name` has none, or one that needs its code."""
    if not name:
        return None
    if os.path.isdir(name) and not any((Path(name) / file).exists() for file in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

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


def _remedy_for_missing(name: str) -> str:
    if os.path.isdir(name):
        return "the folder needs a config.json and weights (model.safetensors)"
    return "check the folder; or the name on the Hub, and that this machine can reach it"


def _is_path(name: str) -> bool:
    """Whether a name can only be meant as a path: names on the Hub have one slash at most, and none
    at the start."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:400]
