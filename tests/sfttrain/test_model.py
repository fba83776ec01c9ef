"""Check of shards against a model; loading of models and tokenizers as requested."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sftprep import tokenizer_spec
from sftprep.errors import ConfigError, InputNotFound, MismatchError, MissingDependency
from sfttrain import ModelConfig, get_kbit_device_map, get_peft_config, get_quantization_config
from sfttrain.models.adapters import add_adapter
from sfttrain.models.build_tokenizer import tokenizer_for
from sfttrain.models.loading import (
    check_match,
    cpu_has_bfloat16,
    load_model,
    trainable_share,
)
from tests.sfttrain.packs import MemoryPacks, make_pack
from tests.sfttrain.tiny import VOCABULARY, tiny_model
from tests.support import SHARED, needs_shared

CPU = torch.device("cpu")


@dataclass
class Shards(MemoryPacks):
    """Packs with the part of a manifest that training reads."""

    packs: Any = field(default_factory=lambda: [make_pack([10, 40])])
    max_id: int = VOCABULARY - 1
    fingerprint: str = "a"

    @property
    def manifest(self) -> Any:
        tokenizer = {"name": "theirs", "fingerprint": self.fingerprint, "max_id": self.max_id}
        return SimpleNamespace(
            max_length=max(len(p.input_ids) for p in self.packs),
            tokenizer=tokenizer,
            chat_template=None,
        )


def test_shards_that_fit_the_model_are_accepted() -> None:
    assert check_match(tiny_model("llama"), Shards(), "a") == []
    assert check_match(tiny_model("llama"), Shards(), None) == []


def test_an_id_beyond_the_embedding_is_always_rejected() -> None:
    with pytest.raises(MismatchError, match=f"id {VOCABULARY}, .* {VOCABULARY} rows"):
        check_match(tiny_model("llama"), Shards(max_id=VOCABULARY), "a", ("tokenizer", "length"))


def test_another_tokenizer_is_rejected_unless_allowed() -> None:
    with pytest.raises(MismatchError, match="another tokenizer") as caught:
        check_match(tiny_model("llama"), Shards(), "b")
    assert "add tokenizer to allow_mismatch" in caught.value.remedy
    assert "another tokenizer" in check_match(tiny_model("llama"), Shards(), "b", ("tokenizer",))[0]


def test_sequences_longer_than_the_context_are_rejected_but_not_packs() -> None:
    model = tiny_model("llama")  # 64 positions
    assert check_match(model, Shards(packs=[make_pack([60, 64, 60])]), "a") == []
    shards = Shards(packs=[make_pack([65])])
    with pytest.raises(MismatchError, match=r"65 tokens, .* end at 64") as caught:
        check_match(model, shards, "a")
    assert "max_length=64" in caught.value.remedy
    assert len(check_match(model, shards, "a", ("length",))) == 1


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({}, torch.float32),
        ({"dtype": "auto"}, torch.bfloat16),
        ({"torch_dtype": "float16"}, torch.float16),
        ({"use_peft": True}, torch.float32),
    ],
)
def test_a_model_is_loaded_in_the_requested_precision(
    tmp_path: Path, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    assert (
        load_model(ModelConfig(model_name_or_path=str(tmp_path), **settings), device=CPU).dtype
        == dtype
    )


def test_a_missing_model_is_reported(tmp_path: Path) -> None:
    with pytest.raises(InputNotFound, match="nowhere"):
        load_model(ModelConfig(model_name_or_path=str(tmp_path / "nowhere")), device=CPU)
    with pytest.raises((ConfigError, InputNotFound)) as caught:
        load_model(ModelConfig(model_name_or_path=str(tmp_path)), device=CPU)
    assert caught.value.remedy
    with pytest.raises(ConfigError, match="no model"):
        load_model(ModelConfig(), device=CPU)


def test_bfloat16_support_is_read_from_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, wanted in (
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"avx512_f": True}, False),
        ({}, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        assert cpu_has_bfloat16() == wanted
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not cpu_has_bfloat16()


def test_an_adapter_is_inserted_as_configured() -> None:
    assert get_peft_config(ModelConfig()) is None
    config = get_peft_config(
        ModelConfig(
            use_peft=True, lora_r=4, lora_alpha=7, lora_modules_to_save=["lm_head"], use_rslora=True
        )
    )
    assert config is not None
    assert (config.r, config.lora_alpha, config.lora_dropout, config.target_modules) == (
        4,
        7,
        0.05,
        "all-linear",
    )
    model = add_adapter(tiny_model("llama"), config)
    names = {
        name.split(".lora_A")[0].rsplit(".", 1)[-1]
        for name, _ in model.named_parameters()
        if "lora_A" in name
    }
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    trained, every = trainable_share(model)
    assert 0 < trained < every
    with pytest.raises(ConfigError, match="adapter already"):
        add_adapter(model, config)
    with pytest.raises(ConfigError, match="no adapter can be inserted into") as caught:
        add_adapter(
            tiny_model("llama"),
            get_peft_config(ModelConfig(use_peft=True, lora_target_modules=["nothing"])),
        )
    assert "lora_target_modules" in caught.value.remedy


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True, "use_peft": True}, "both"),
        ({"load_in_4bit": True}, "quantized"),
        ({"lora_r": 0}, "lora_r"),
        ({"lora_task_type": "SEQ_CLS"}, "lora_task_type"),
    ],
)
def test_contradictory_model_settings_are_rejected(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ModelConfig(**settings)


def test_quantization_is_configured_as_in_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    assert get_quantization_config(ModelConfig()) is None
    wanted = ModelConfig(use_peft=True, load_in_4bit=True, use_bnb_nested_quant=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="bitsandbytes"):
        get_quantization_config(wanted)
    if not torch.cuda.is_available():
        assert get_kbit_device_map() is None


@needs_shared
def test_the_saved_tokenizer_has_the_template_and_end_token_of_the_shards() -> None:
    name = str(SHARED / "models" / "stories260k")
    from transformers import AutoTokenizer

    spec = tokenizer_spec(AutoTokenizer.from_pretrained(name))
    manifest = SimpleNamespace(
        max_length=10,
        tokenizer={
            "name": name,
            "fingerprint": spec.fingerprint,
            "eos_token_id": spec.eos_token_id,
        },
        chat_template="{{ 1 }}",
    )
    tokenizer, fingerprint = tokenizer_for(ModelConfig(model_name_or_path=name), manifest)
    assert fingerprint == spec.fingerprint
    assert tokenizer is not None
    assert tokenizer.chat_template == "{{ 1 }}"
    # Shards built with --eos-token have another fingerprint of the same tokenizer.
    other = spec.with_eos("<s>")
    manifest.tokenizer = {
        "name": name,
        "fingerprint": other.fingerprint,
        "eos_token_id": other.eos_token_id,
    }
    tokenizer, fingerprint = tokenizer_for(ModelConfig(model_name_or_path=name), manifest)
    assert fingerprint == other.fingerprint != spec.fingerprint
    assert tokenizer is not None
    assert tokenizer.eos_token == "<s>"


@needs_shared
def test_a_model_without_a_tokenizer_gets_the_tokenizer_of_the_shards(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    manifest = SimpleNamespace(
        max_length=10,
        tokenizer={"name": str(SHARED / "models" / "stories260k")},
        chat_template=None,
    )
    tokenizer, fingerprint = tokenizer_for(ModelConfig(model_name_or_path=str(tmp_path)), manifest)
    assert fingerprint is None
    assert tokenizer is not None
    assert len(tokenizer) == 512
    manifest.tokenizer = {"name": str(tmp_path / "gone")}
    assert tokenizer_for(ModelConfig(model_name_or_path=str(tmp_path)), manifest) == (None, None)
