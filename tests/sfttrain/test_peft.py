"""Adapters: training of new tokens, saving, and merging."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from sftprep import tokenizer_spec
from sftprep.errors import ConfigError
from sfttrain import ModelConfig
from sfttrain.cli.main import main
from sfttrain.models.adapters import (
    add_adapter,
    find_new_token_rows,
    grow_embedding,
    merge_adapter,
    record_new_tokens,
)
from tests.sfttrain.builds import write_build
from tests.sfttrain.packs import MemoryPacks, make_pack
from tests.sfttrain.test_trainer import losses, trainer_for, weights
from tests.sfttrain.tiny import VOCABULARY, tiny_model

CPU = torch.device("cpu")
IDS = torch.arange(3, 20)[None]
NEW = [VOCABULARY, VOCABULARY + 1]


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=4, **{"target_modules": "all-linear", **options})


def tokenizer_of(tokens: int, *added: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of `tokens` words and some added tokens."""
    words = {f"w{number}": number for number in range(tokens)}
    found = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), pad_token="w0"
    )
    found.add_tokens(list(added))
    return found


def checkpoint(folder: Path, kind: str = "llama", **changes: Any) -> Path:
    """Save a model with its tokenizer."""
    tiny_model(kind, **changes).save_pretrained(folder)
    tokenizer_of(VOCABULARY).save_pretrained(folder)
    return folder


def packs_with(tokens: list[int]) -> MemoryPacks:
    """Return packs that contain these tokens, as inputs and as targets."""
    packs = [make_pack([12, 9], seed=number, trained=1.0) for number in range(4)]
    for pack in packs:
        pack.input_ids[2::4] = np.resize(tokens, len(pack.input_ids[2::4]))
    return MemoryPacks(packs)


@pytest.mark.parametrize("kind", ["llama", "gemma", "gpt2"])
@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_are_trained_and_no_others(tmp_path: Path, kind: str, tied: bool) -> None:
    model = tiny_model(kind, tie_word_embeddings=tied)
    model.resize_token_embeddings(VOCABULARY + 3)
    record_new_tokens(model, NEW)
    before = [
        layer.weight.detach().clone()
        for layer in (model.get_input_embeddings(), model.get_output_embeddings())
    ]
    trainer = trainer_for(tmp_path, model=model, packs=packs_with(NEW), peft_config=lora())
    trainer.train()
    inner = trainer.model.merge_and_unload()
    layers = (inner.get_input_embeddings(), inner.get_output_embeddings())
    for layer, old in zip(layers, before, strict=True):
        moved = (layer.weight.detach() != old).any(-1).nonzero()[:, 0].tolist()
        assert moved == NEW
    assert (layers[0].weight is layers[1].weight) == tied
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_base_weights_do_not_change(tmp_path: Path) -> None:
    model = tiny_model("llama")
    before = weights(model)
    trainer = trainer_for(tmp_path, model=model, peft_config=lora())
    trainer.train()
    after = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): v
        for name, v in weights(trainer.model).items()
    }
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_adapters_with_new_tokens_load_in_plain_peft(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint(tmp_path / "base"))
    model.resize_token_embeddings(VOCABULARY + 2)
    # The new rows are not recorded; they are beyond those of the checkpoint.
    trainer = trainer_for(tmp_path / "out", model=model, packs=packs_with(NEW), peft_config=lora())
    trainer.train()
    trainer.save_model()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(VOCABULARY + 2)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
    ids = torch.tensor([[5, NEW[0], 7, NEW[1], 9]])
    with torch.no_grad():
        found, wanted = loaded(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_new_token_rows_are_found_by_checkpoint_and_tokenizer(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint(tmp_path / "base"))
    assert find_new_token_rows(model) == []
    assert find_new_token_rows(model, tokenizer_of(VOCABULARY)) == []
    # The embedding had spare rows, for which the checkpoint's own tokenizer has no token.
    tokenizer_of(VOCABULARY - 8).save_pretrained(tmp_path / "base")
    assert find_new_token_rows(model) == []
    assert find_new_token_rows(model, tokenizer_of(VOCABULARY - 8, "<a>", "<b>")) == [
        VOCABULARY - 8,
        VOCABULARY - 7,
    ]
    # Of the rows beyond the checkpoint, only those of tokens are new.
    model.resize_token_embeddings(VOCABULARY + 16)
    assert find_new_token_rows(model, tokenizer_of(VOCABULARY, "<a>")) == [
        *range(VOCABULARY - 8, VOCABULARY),
        VOCABULARY,
    ]
    record_new_tokens(model, [3])
    assert find_new_token_rows(model)[0] == 3
    assert find_new_token_rows(tiny_model("llama")) == []


def test_an_embedding_grows_only_for_its_own_tokenizer_with_more_tokens(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint(tmp_path / "base"))
    assert grow_embedding(model, tokenizer_of(VOCABULARY), VOCABULARY - 1) == 0
    other = tokenizer_of(VOCABULARY - 1, "<other>", "<a>")  # the checkpoint has w127 at this id
    assert grow_embedding(model, other, VOCABULARY) == 0
    assert model.get_input_embeddings().weight.shape[0] == VOCABULARY
    assert grow_embedding(model, tokenizer_of(VOCABULARY, "<a>", "<b>"), VOCABULARY) == 2
    assert model.get_input_embeddings().weight.shape[0] == VOCABULARY + 2
    assert find_new_token_rows(model) == NEW


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"modules_to_save": ["embed_tokens"]}, {"lm_head": NEW}),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, None),
        ({"target_modules": ["q_proj", "lm_head"]}, {"model.embed_tokens": NEW}),
        ({"trainable_token_indices": [4]}, {"model.embed_tokens": [4, *NEW], "lm_head": NEW}),
        (
            {"trainable_token_indices": {"embed_tokens": [4]}},
            {"embed_tokens": [4, *NEW], "lm_head": NEW},
        ),
    ],
)
def test_new_rows_are_joined_with_the_configuration(options: dict[str, Any], rows: Any) -> None:
    model = tiny_model("llama")
    model.resize_token_embeddings(VOCABULARY + 2)
    record_new_tokens(model, NEW)
    config = lora(**options)
    adapted = add_adapter(model, config)
    assert adapted.peft_config["default"].trainable_token_indices == rows
    assert config.trainable_token_indices == options.get("trainable_token_indices")


def test_the_bias_of_a_head_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    """peft's layer for selected rows omits the bias, so it must not replace such a head."""
    model = tiny_model("phi")
    with torch.no_grad():
        model.lm_head.bias.normal_()
    wanted = model(input_ids=IDS).logits
    record_new_tokens(model, [5])
    with caplog.at_level(logging.WARNING, logger="sfttrain.models.adapters"):
        adapted = add_adapter(model, lora())
    torch.testing.assert_close(adapted.eval()(input_ids=IDS).logits, wanted)
    assert adapted.peft_config["default"].trainable_token_indices == {"model.embed_tokens": [5]}
    assert "has a bias" in caplog.text


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [5]},
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_model_has_the_logits_of_the_trained_model(
    tmp_path: Path, options: dict[str, Any], tied: bool
) -> None:
    folder = checkpoint(tmp_path / "base", tie_word_embeddings=tied)
    trainer = trainer_for(
        tmp_path / "out",
        model=AutoModelForCausalLM.from_pretrained(folder),
        packs=packs_with([5]),
        peft_config=lora(**options),
    )
    trainer.train()
    trainer.save_model()
    base = ModelConfig(model_name_or_path=str(folder), use_peft=True)
    merge_adapter(
        tmp_path / "out",
        tmp_path / "merged",
        base=base,
        device=CPU,
        tokenizer=tokenizer_of(VOCABULARY),
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        found, wanted = merged(input_ids=IDS).logits, trainer.model.eval()(input_ids=IDS).logits
        untrained = AutoModelForCausalLM.from_pretrained(folder)(input_ids=IDS).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, untrained, atol=1e-2)
    assert (tmp_path / "merged" / "tokenizer_config.json").exists()
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    # A head that was trained completely is not tied to the frozen embedding any more.
    assert merged.config.tie_word_embeddings == (tied and "modules_to_save" not in options)
    assert sorted(merged.state_dict()) == sorted(
        tiny_model("llama", tie_word_embeddings=tied).state_dict()
    )


def run(
    capsys: pytest.CaptureFixture[str], packs: Path, base: Path, out: Path, *more: str
) -> dict[str, Any]:
    """Run `sfttrain run` and return its summary."""
    capsys.readouterr()
    command = [
        "run",
        str(packs),
        "--model",
        str(base),
        "--output_dir",
        str(out),
        "--json",
        "--use_cpu",
        "--max_steps",
        "4",
    ]
    assert main([*command, "--use_peft", "--lora_r", "4", "--learning_rate", "1e-2", *more]) == 0
    summary: dict[str, Any] = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    return summary


@pytest.mark.parametrize("bits", [[], ["--load_in_4bit"]])
def test_merging_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bits: list[str]
) -> None:
    if bits:
        pytest.importorskip("bitsandbytes", reason="the extra [quant] is not installed")
    base = checkpoint(tmp_path / "base")
    packs = write_build(
        tmp_path / "packs", packs_with([5]), tokenizer={"name": "", "fingerprint": ""}
    )
    summary = run(capsys, packs, base, tmp_path / "out", "--merge", *bits)
    assert summary["merged"] == str(tmp_path / "out" / "merged")
    merged = AutoModelForCausalLM.from_pretrained(summary["merged"])
    if bits:  # the values are tested in test_quant.py
        assert getattr(merged.config, "quantization_config", None) is None
    else:
        adapted = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "out")
        ).eval()
        with torch.no_grad():
            torch.testing.assert_close(
                merged(input_ids=IDS).logits, adapted(input_ids=IDS).logits, rtol=1e-5, atol=1e-5
            )
    assert (tmp_path / "out" / "merged" / "tokenizer.json").exists()


def test_a_tokenizer_with_more_tokens_than_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The embedding grows for its tokens, is trained with the adapter, and is merged."""
    base = checkpoint(tmp_path / "base")
    longer = tokenizer_of(VOCABULARY, "<a>", "<b>")
    longer.save_pretrained(tmp_path / "longer")
    packs = write_build(
        tmp_path / "packs",
        packs_with(NEW),
        tokenizer={
            "name": str(tmp_path / "longer"),
            "fingerprint": tokenizer_spec(longer).fingerprint,
        },
    )
    summary = run(capsys, packs, base, tmp_path / "out", "--merge", "--allow_mismatch", "tokenizer")
    assert "2 new rows" in " ".join(summary["warnings"])
    merged = AutoModelForCausalLM.from_pretrained(summary["merged"])
    assert merged.get_input_embeddings().weight.shape[0] == VOCABULARY + 2
    assert len(AutoTokenizer.from_pretrained(summary["merged"])) == VOCABULARY + 2
    grown = AutoModelForCausalLM.from_pretrained(base)
    grown.resize_token_embeddings(VOCABULARY + 2)
    adapted = PeftModel.from_pretrained(grown, str(tmp_path / "out")).eval()
    ids = torch.tensor([[5, NEW[0], 7, NEW[1], 9]])
    with torch.no_grad():
        torch.testing.assert_close(
            merged(input_ids=ids).logits, adapted(input_ids=ids).logits, rtol=1e-5, atol=1e-5
        )


def test_merging_without_an_adapter_is_rejected() -> None:
    with pytest.raises(ConfigError, match="no adapter to merge"):
        ModelConfig(merge=True)
