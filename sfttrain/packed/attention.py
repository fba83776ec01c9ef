"""Which attention a model is trained with, so that the sequences of a packed row cannot see each
other."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator

import torch
from torch import nn

from sftprep.errors import AttentionError
from sfttrain.config.attention_names import CHOICES, reject_mixing
from sfttrain.finite import reject_not_finite
from sfttrain.models.bnb_cpu import keep_gradients
from sfttrain.models.unwrap import unwrap_peft
from sfttrain.packed import varlen
from sfttrain.packed.forward import ForwardMode
from sfttrain.packed.isolation_check import IsolationGuard, Verdict

_FLASH_PACKAGES = {
    "flash_attention_4": "flash_attn.cute",
    "flash_attention_3": "flash_attn_interface",
    "flash_attention_2": "flash_attn",
}

logger = logging.getLogger(__name__)


def settle_attention(
    model: nn.Module,
    asked: str,
    *,
    longest: int,
    autocast: torch.dtype | None = None,
    guard: bool = True,
) -> ForwardMode:
    """Set the model to the first attention that is there and keeps sequences apart, and say how
    rows are fed to it.

    model: on its device; asked: one of CHOICES; longest: tokens of the longest sequence; autocast:
    dtype of mixed precision. auto falls back from one implementation to the next, and at last to
    unpacking, with one warning; anything else is used or refused. With guard=False the first that
    can be set is trusted. Raises AttentionError: eager, sdpa and flex_attention asked for by name;
    an implementation that is not there, or that fails the guard; a model that does not even train
    right unpacked. Raises ConfigError for a model with weights that are not finite.
    """
    varlen.register()
    reject_mixing(asked)
    keep_gradients(model)
    base = unwrap_peft(model)
    before = str(base.config._attn_implementation)
    judge = (
        IsolationGuard(model, int(base.get_input_embeddings().weight.shape[0]), autocast)
        if guard
        else None
    )
    if judge is not None and not judge.is_finite_alone:
        reject_not_finite(model)  # otherwise nothing but NaN would be compared
    failures: list[str] = []
    for name in _candidates(asked, before, next(model.parameters()), autocast):
        feeding, failure = _attempt(model, name, longest, judge)
        if feeding is not None:
            return feeding
        failures.append(f"{name}: {failure}")
    if asked not in ("auto", "unpack"):
        raise AttentionError(
            f"--attn {asked} cannot train {type(base).__name__} on packed rows; {failures[0]}",
            remedy="use --attn auto, which takes what works and unpacks rows where nothing does",
        )
    if str(base.config._attn_implementation) != before:
        base.set_attn_implementation(before)
    feeding = ForwardMode.of(model, before, unpack=True)
    verdict = judge.ask(feeding) if judge else None
    if verdict is not None and not verdict.isolated:
        if "no attribute 'logits'" in verdict.error:
            raise AttentionError(
                f"{type(base).__name__} has no logits",
                remedy="give a causal language model: AutoModelForCausalLM",
            )
        raise AttentionError(
            f"{type(base).__name__} gives other logits in a padded batch than alone: {verdict}",
            remedy=(
                "train it on batches of one sequence: build with --packing none and set"
                " --per_device_train_batch_size 1"
            ),
        )
    if asked == "auto":
        logger.warning(
            "%s cannot keep packed sequences apart (%s); rows are unpacked into padded batches: as"
            " exact, but slower",
            type(base).__name__,
            "; ".join(failures),
        )
    return feeding


def missing_for(name: str, device: torch.device) -> str:
    """Why the attention `name` cannot run on this machine; '' where it can."""
    if name in ("sft_varlen", "unpack"):
        return ""
    if device.type != "cuda":
        return (
            f"it needs a CUDA device, and the model is on {device.type} (torch {torch.__version__})"
        )
    if name == "torch_varlen":
        return (
            ""
            if importlib.util.find_spec("torch.nn.attention.varlen")
            else f"torch {torch.__version__} has no varlen attention"
        )
    major = torch.cuda.get_device_capability(device)[0]
    if name in _FLASH_PACKAGES:
        if not _importable(_FLASH_PACKAGES[name]):
            return (
                f"the package {_FLASH_PACKAGES[name]} is not installed (pip install"
                ' "sftprep[flash]" --no-build-isolation)'
            )
        needed = {"flash_attention_2": 8, "flash_attention_3": 9, "flash_attention_4": 9}[name]
        if major < needed or (name == "flash_attention_3" and major != 9):
            return f"it does not run on a GPU of compute capability {major}"
    return ""


def _candidates(
    asked: str, before: str, parameter: nn.Parameter, autocast: torch.dtype | None
) -> Iterator[str]:
    if asked == "unpack":
        return
    if asked != "auto":
        reason = missing_for(asked, parameter.device)
        if reason:
            raise AttentionError(
                f"--attn {asked} is not possible here: {reason}", remedy="use --attn auto"
            )
        yield asked
        return
    narrow = autocast is not None or parameter.dtype in (torch.float16, torch.bfloat16)
    if narrow:
        # A model that was loaded with a flash implementation is left with it, if it can be.
        order = sorted(CHOICES[1:5], key=lambda name: name != before)
        yield from (name for name in order if not missing_for(name, parameter.device))
    yield "sft_varlen"


def _attempt(
    model: nn.Module, name: str, longest: int, judge: IsolationGuard | None
) -> tuple[ForwardMode | None, str]:
    """Set the model to `name` and ask the guard; a Feeding, or why not."""
    base = unwrap_peft(model)
    chunk = getattr(base.config.get_text_config(), "attention_chunk_size", None)
    chunked = "chunked_attention" in (
        getattr(base.config.get_text_config(), "layer_types", None) or ()
    )
    if chunked and chunk is not None and longest > chunk:
        return (
            None,
            (
                f"its attention works in chunks of {chunk} tokens, which no packed attention knows,"
                " and sequences are longer"
            ),
        )
    if not getattr(base, "_can_set_attn_implementation", lambda: True)():
        # Asked first because set_attn_implementation would only log a warning, and change nothing.
        return (
            None,
            "its attention cannot be set (the model does not use transformers' AttentionInterface)",
        )
    try:
        base.set_attn_implementation(name)
    except (ImportError, ValueError, KeyError, RuntimeError, OSError) as error:
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if str(base.config._attn_implementation) != name:
        return None, "the model keeps another attention"
    feeding = ForwardMode.of(model, name)
    verdict: Verdict | None = judge.ask(feeding) if judge else None
    return (feeding, "") if verdict is None or verdict.isolated else (None, str(verdict))


def _importable(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the parent of a dotted name is not there
        return False
