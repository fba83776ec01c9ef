"""Choice of an attention implementation with isolated packed sequences.

1. List the candidates: the requested implementation, or for `auto` those that run on this machine,
   fastest first, and `sft_varlen` at last.
2. Set the model to each candidate in turn and verify its isolation on the model itself
   (`isolation_check`). The first candidate that passes is used.
3. If no candidate of `auto` passes, feed the sequences of a row as padded batches, which is exact
   and slower (`padded_fallback`).
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator

import torch
from torch import nn

from sftprep.errors import AttentionError, setting
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


def resolve_attention(
    model: nn.Module,
    requested: str,
    *,
    longest: int,
    autocast: torch.dtype | None = None,
    guard: bool = True,
) -> ForwardMode:
    """Set the model to an attention implementation with isolated sequences.

    `auto` falls back from one implementation to the next and at last to padded batches, with one
    warning. Any other implementation is used or rejected, never replaced.

    Args:
        model: The model, on its device.
        requested: One of `CHOICES`, or the name of a kernel repository.
        longest: The length of the longest sequence in tokens.
        autocast: The dtype of mixed precision; None without mixed precision.
        guard: Whether isolation is verified; without it, the first candidate that can be set is
            trusted.

    Returns:
        How rows are passed to the model.

    Raises:
        AttentionError: For eager, sdpa and flex_attention requested by name; for an implementation
            that is not available or does not isolate sequences; for a model that is not exact in
            padded batches either.
        ConfigError: If the model has non-finite weights.
    """
    varlen.register()
    reject_mixing(requested)
    keep_gradients(model)
    base = unwrap_peft(model)
    initial = str(base.config._attn_implementation)
    checker = (
        IsolationGuard(model, int(base.get_input_embeddings().weight.shape[0]), autocast)
        if guard
        else None
    )
    if checker is not None and not checker.is_finite_alone:
        reject_not_finite(model)  # every comparison with NaN would fail for the wrong reason
    failures: list[str] = []
    for name in _list_candidates(requested, initial, next(model.parameters()), autocast):
        mode, failure = _try_attention(model, name, longest, checker)
        if mode is not None:
            return mode
        failures.append(f"{name}: {failure}")
    if requested not in ("auto", "unpack"):
        raise AttentionError(
            f"{setting('attn', requested)} cannot train {type(base).__name__} on packed rows;"
            f" {failures[0]}",
            remedy=(
                f"use {setting('attn', 'auto')}, which chooses an implementation that works, and"
                " unpacks rows if there is none"
            ),
        )
    return _fall_back_to_padding(model, requested, initial, checker, failures)


def _fall_back_to_padding(
    model: nn.Module,
    requested: str,
    initial: str,
    checker: IsolationGuard | None,
    failures: list[str],
) -> ForwardMode:
    """Restore the initial attention; verify and return the mode of padded batches."""
    base = unwrap_peft(model)
    if str(base.config._attn_implementation) != initial:
        base.set_attn_implementation(initial)
    mode = ForwardMode.from_model(model, initial, unpack=True)
    verdict = checker.check(mode) if checker else None
    if verdict is not None and not verdict.is_isolated:
        if "no attribute 'logits'" in verdict.error:
            raise AttentionError(
                f"{type(base).__name__} has no logits",
                remedy="use a causal language model: AutoModelForCausalLM",
            )
        raise AttentionError(
            f"{type(base).__name__} gives other logits in a padded batch than alone: {verdict}",
            remedy=(
                "train it on batches of one sequence: pack nothing (`sftprep build ... --packing"
                f" none`, or {setting('packing', False)} for raw records), and set"
                f" {setting('per_device_train_batch_size', 1)}"
            ),
        )
    if requested == "auto":
        logger.warning(
            "%s cannot isolate packed sequences (%s); rows are unpacked into padded batches, which"
            " is exact but slower",
            type(base).__name__,
            "; ".join(failures),
        )
    return mode


def explain_unavailable(name: str, device: torch.device) -> str:
    """Return why an attention implementation cannot run on this machine, or ""."""
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
        if not _is_importable(_FLASH_PACKAGES[name]):
            return (
                f"the package {_FLASH_PACKAGES[name]} is not installed (pip install"
                ' "sftprep[flash]" --no-build-isolation)'
            )
        needed = {"flash_attention_2": 8, "flash_attention_3": 9, "flash_attention_4": 9}[name]
        # The kernels of version 3 exist for Hopper (9.x) only.
        if major < needed or (name == "flash_attention_3" and major != 9):
            return f"it does not run on a GPU of compute capability {major}"
    return ""


def first_available(device: torch.device) -> tuple[str, dict[str, str]]:
    """Return the implementation that `auto` tries first for a model in 16 bits.

    It is used if the model supports it and it isolates the model's sequences, which is verified on
    the model itself.

    Args:
        device: The device of the model.

    Returns:
        The name; and of each implementation before it, why it cannot run on this machine.
    """
    reasons = {name: explain_unavailable(name, device) for name in CHOICES[1:-1]}
    name = next(name for name, reason in reasons.items() if not reason)
    return name, {other: reason for other, reason in reasons.items() if reason}


def _list_candidates(
    requested: str, initial: str, parameter: nn.Parameter, autocast: torch.dtype | None
) -> Iterator[str]:
    if requested == "unpack":
        return
    if requested != "auto":
        reason = explain_unavailable(requested, parameter.device)
        if reason:
            raise AttentionError(
                f"{setting('attn', requested)} is not possible here: {reason}",
                remedy=f"use {setting('attn', 'auto')}",
            )
        yield requested
        return
    # The kernels of flash attention and torch support 16 bits only.
    in_16_bits = autocast is not None or parameter.dtype in (torch.float16, torch.bfloat16)
    if in_16_bits:
        # A model that was loaded with a flash implementation keeps it if possible, because the
        # user chose it.
        order = sorted(CHOICES[1:5], key=lambda name: name != initial)
        yield from (name for name in order if not explain_unavailable(name, parameter.device))
    yield "sft_varlen"


def _try_attention(
    model: nn.Module, name: str, longest: int, checker: IsolationGuard | None
) -> tuple[ForwardMode | None, str]:
    """Set the model to an implementation and verify it.

    Returns:
        The mode and "" if the implementation isolates sequences; else None and the reason.
    """
    base = unwrap_peft(model)
    config = base.config.get_text_config()
    chunk = getattr(config, "attention_chunk_size", None)
    has_chunks = "chunked_attention" in (getattr(config, "layer_types", None) or ())
    if has_chunks and chunk is not None and longest > chunk:
        return (
            None,
            (
                f"its attention works in chunks of {chunk} tokens, which no packed attention"
                " supports, and sequences are longer"
            ),
        )
    if not getattr(base, "_can_set_attn_implementation", lambda: True)():
        # Checked first, because set_attn_implementation would log a warning and change nothing.
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
    mode = ForwardMode.from_model(model, name)
    verdict: Verdict | None = checker.check(mode) if checker else None
    return (mode, "") if verdict is None or verdict.is_isolated else (None, str(verdict))


def _is_importable(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the parent package of a dotted name is not installed
        return False
