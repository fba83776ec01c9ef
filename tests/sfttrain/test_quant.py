"""Adapters on quantized base models, with bitsandbytes' kernels for CPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from sftprep.errors import ConfigError
from sfttrain import ModelConfig, get_peft_config
from sfttrain.models.adapters import add_adapter, merge_adapter
from sfttrain.models.bnb_cpu import keep_gradients
from sfttrain.models.loading import load_model
from tests.sfttrain.packs import make_packs
from tests.sfttrain.test_peft import checkpoint
from tests.sfttrain.test_trainer import losses, trainer_for, weights
from tests.sfttrain.tiny import tiny_model

has_avx512bf16 = pytest.importorskip(
    "bitsandbytes.functional", reason="the extra [quant] is not installed"
).has_avx512bf16

CPU = torch.device("cpu")
IDS = torch.arange(3, 20)[None]
# The layers have more than one block of 64 numbers, each of which has its own scale.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
BITS = {
    "nf4": {"load_in_4bit": True},
    "nf4, nested": {"load_in_4bit": True, "use_bnb_nested_quant": True},
    "fp4, float32": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "dtype": "float32"},
    "int8": {"load_in_8bit": True},
}


def quantized(folder: Path, bits: str, **lora: Any) -> tuple[Any, ModelConfig]:
    """Return a quantized model with an adapter, and its configuration."""
    base = folder / "base"
    if not base.exists():
        checkpoint(base, "llama", **SIZES)
    wanted = ModelConfig(
        model_name_or_path=str(base),
        use_peft=True,
        lora_dropout=0.0,
        lora_r=4,
        **BITS[bits],
        **lora,
    )
    torch.manual_seed(0)
    return add_adapter(load_model(wanted, device=CPU), get_peft_config(wanted)), wanted


def frozen_bytes(model: Any) -> dict[str, torch.Tensor]:
    """Return all frozen parameters as they are in memory, packed numbers included."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize(
    ("bits", "lora"),
    [
        ("nf4", {}),
        ("nf4, nested", {}),
        ("int8", {}),
        ("nf4", {"use_rslora": True}),
        ("nf4", {"use_dora": True}),
        ("int8", {"use_rslora": True}),
    ],
)
def test_an_adapter_on_a_quantized_base_trains_is_saved_and_loads(
    tmp_path: Path, bits: str, lora: dict[str, Any]
) -> None:
    model, wanted = quantized(tmp_path, bits, **lora)
    before = frozen_bytes(model)
    trainer = trainer_for(tmp_path / "out", model=model, max_steps=8)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.05
    after = frozen_bytes(trainer.model)
    assert any(value.dtype in (torch.uint8, torch.int8) for value in before.values())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    trainer.save_model()
    loaded = PeftModel.from_pretrained(load_model(wanted, device=CPU), str(tmp_path / "out")).eval()
    keep_gradients(loaded)  # or bitsandbytes would use another kernel on some CPUs
    with torch.no_grad():
        found, trained = loaded(input_ids=IDS).logits, trainer.model.eval()(input_ids=IDS).logits
        with trainer.model.disable_adapter():
            untrained = trainer.model(input_ids=IDS).logits
    # The results differ slightly, because training keeps norms and head in float32.
    torch.testing.assert_close(found.float(), trained.float(), rtol=2e-2, atol=2e-2)
    assert not torch.allclose(trained, untrained, atol=5e-2)


def test_dora_on_8_bits_on_a_cpu_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="DoRA"):
        quantized(tmp_path, "int8", use_dora=True)


@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_an_evaluation_before_training_changes_nothing(tmp_path: Path, bits: str) -> None:
    """bitsandbytes would change 4-bit weights at an evaluation, which stops their gradients."""
    runs = []
    for evaluate in (False, True):
        model, _ = quantized(tmp_path, bits)
        trainer = trainer_for(
            tmp_path / "out", model=model, max_steps=3, eval_dataset=make_packs(2, seed=1)
        )
        if evaluate:
            trainer.evaluate()
        trainer.train()
        runs.append((losses(trainer), weights(trainer.model)))
    assert runs[0][0] == runs[1][0]
    assert all(
        torch.equal(value, runs[1][1][name])
        for name, value in runs[0][1].items()
        if "lora_" in name
    )
    assert any(
        value.any()
        for name, value in runs[0][1].items()
        if "layers.0." in name and "lora_B" in name
    )


def test_weights_that_were_packed_for_inference_are_unpacked(tmp_path: Path) -> None:
    model, _ = quantized(tmp_path, "nf4")
    layers = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    before = [layer.weight.detach().clone() for layer in layers]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = has_avx512bf16()
    with torch.no_grad():
        model.eval()(input_ids=IDS)
    keep_gradients(model)
    assert all(
        torch.equal(layer.weight.view(-1), value.view(-1))
        for layer, value in zip(layers, before, strict=True)
    )
    model.train()(input_ids=IDS).logits.sum().backward()
    assert any(
        p.grad is not None and p.grad.any()
        for n, p in model.named_parameters()
        if "layers.0." in n and "lora_B" in n
    )


@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_what_is_not_quantized_is_float32_and_only_the_adapter_is_trained(
    tmp_path: Path, bits: str
) -> None:
    tiny_model("llama", **SIZES).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    wanted = ModelConfig(
        model_name_or_path=str(tmp_path / "base"), use_peft=True, dtype="bfloat16", **BITS[bits]
    )
    model = add_adapter(load_model(wanted, device=CPU), get_peft_config(wanted))
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert {
        kinds[name] for name in kinds if "norm" in name or "embed" in name or "lm_head" in name
    } == {torch.float32}
    assert {kinds[name] for name in kinds if "base_layer.weight" in name} <= {
        torch.uint8,
        torch.int8,
    }
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name in kinds if "lora_" in name}
    assert {kinds[name] for name in trained} == {torch.float32}
    assert not model.is_gradient_checkpointing  # the trainer switches it on


@pytest.mark.parametrize("bits", ["nf4"])
def test_checkpointing_changes_nothing_on_a_quantized_base(tmp_path: Path, bits: str) -> None:
    runs = []
    for checkpointing in (False, True):
        model, _ = quantized(tmp_path, bits)
        trainer = trainer_for(
            tmp_path / "out", model=model, max_steps=3, gradient_checkpointing=checkpointing
        )
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


@pytest.mark.parametrize("bits", ["nf4", "fp4, float32", "int8"])
def test_a_quantized_base_is_merged_in_full_precision(tmp_path: Path, bits: str) -> None:
    from transformers import AutoModelForCausalLM

    model, wanted = quantized(tmp_path, bits)
    trainer = trainer_for(tmp_path / "out", model=model, max_steps=8)
    trainer.train()
    trainer.save_model()
    merge_adapter(tmp_path / "out", tmp_path / "merged", base=wanted, device=CPU)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert getattr(merged.config, "quantization_config", None) is None
    with torch.no_grad():
        # In products of bfloat16, two kinds of CPU differ by more than that.
        for layer in trainer.model.modules():
            if hasattr(layer, "compute_dtype"):
                layer.compute_dtype = torch.float32
        found, trained = (
            merged(input_ids=IDS).logits.float(),
            trainer.model.eval()(input_ids=IDS).logits.float(),
        )
    # 8-bit activations limit the precision.
    tolerance = {"fp4, float32": 1e-4, "nf4": 1e-4, "int8": 0.25}[bits] * float(trained.std())
    torch.testing.assert_close(found, trained, rtol=0, atol=tolerance)
