"""Training on builds that added the tokens of a chat template to the tokenizer of a base model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sftprep
from sftprep.errors import MismatchError
from sfttrain import SFTConfig, SFTTrainer
from sfttrain.cli.main import main
from tests.conftest import EXAMPLES
from tests.sfttrain.tiny import tiny_model
from tests.sfttrain.trainer_factory import CHATS, make_sft_trainer, model_folder, sequences

NEW = [600, 601]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, base_tokenizer_dir: Path) -> Path:
    return model_folder(tmp_path_factory.mktemp("base"), base_tokenizer_dir)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    folder = tmp_path_factory.mktemp("build") / "packs"
    sftprep.build(
        CHATS * 2,
        tokenizer=str(base),
        chat_template="chatml",
        train_on="assistant",
        max_length=64,
        eval_fraction=0.3,
        output=folder,
    )
    return folder


def command(build: Path, base: Path, out: Path, *more: str) -> list[str]:
    flags = ["--model", str(base), "--output_dir", str(out), "--use_cpu", "--max_steps", "2"]
    return ["run", str(build), *flags, "--learning_rate", "1e-2", *more]


def check_tokenizer(folder: Path, build: Path) -> Any:
    """Check that the saved tokenizer is that of the build, and return it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    manifest = sftprep.read_manifest(build)
    found = sftprep.tokenizer_spec(tokenizer).fingerprint
    assert found == manifest.tokenizer["fingerprint"]
    assert tokenizer.chat_template == manifest.chat_template
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == NEW
    return tokenizer


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_run_resizes_the_model_and_saves_the_tokenizer(
    kind: str, build: Path, base_tokenizer_dir: Path, tmp_path: Path
) -> None:
    base = model_folder(tmp_path / "base", base_tokenizer_dir, kind)
    assert main(command(build, base, tmp_path / "out")) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.get_input_embeddings().weight.shape[0] == 602
    assert model.get_output_embeddings().weight.shape[0] == 602
    assert model.config.eos_token_id == NEW[1]
    assert model.generation_config.eos_token_id == NEW[1]
    check_tokenizer(tmp_path / "out", build)
    # The saved model is trained on by the same build again: nothing is left to add.
    assert main(command(build, tmp_path / "out", tmp_path / "again")) == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.get_input_embeddings().weight.shape[0] == 602


def test_new_rows_start_at_the_mean_of_the_others(build: Path, base: Path, tmp_path: Path) -> None:
    trainer = SFTTrainer(
        str(base),
        SFTConfig(output_dir=str(tmp_path / "out"), use_cpu=True),
        train_dataset=sftprep.open_shards(build),
    )
    weights = trainer.model.get_input_embeddings().weight.detach()
    mean = weights[:600].mean(0)
    assert weights.shape[0] == 602
    assert torch.allclose(weights[600:], mean.expand(2, -1), atol=1e-3)
    check = AutoModelForCausalLM.from_pretrained(base)
    assert torch.equal(check.get_input_embeddings().weight, weights[:600])
    assert trainer.processing_class.eos_token == "<|im_end|>"


def test_an_adapter_trains_the_new_rows(build: Path, base: Path, tmp_path: Path) -> None:
    flags = ("--use_peft", "--lora_r", "4", "--merge")
    assert main(command(build, base, tmp_path / "out", *flags)) == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    rows = {name.rpartition(".")[2]: r for name, r in config["trainable_token_indices"].items()}
    assert rows == {"embed_tokens": NEW, "lm_head": NEW}
    check_tokenizer(tmp_path / "out", build)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    assert merged.get_input_embeddings().weight.shape[0] == 602
    before = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight
    after = merged.get_input_embeddings().weight
    assert torch.equal(after[:600], before)
    check_tokenizer(tmp_path / "out" / "merged", build)
    assert merged.config.eos_token_id == merged.generation_config.eos_token_id == NEW[1]
    assert main(["chat", str(tmp_path / "out"), "--prompt", "Hi", "--max_new_tokens", "2"]) == 0


@pytest.mark.slow
def test_the_example_loads_an_adapter_with_plain_peft(
    build: Path, base: Path, tmp_path: Path
) -> None:
    assert main(command(build, base, tmp_path / "out", "--use_peft", "--lora_r", "4")) == 0
    script = [sys.executable, str(EXAMPLES / "generate.py"), "--model", str(base)]
    script += ["--adapter", str(tmp_path / "out"), "--ask", "Hi", "--max-new-tokens", "2"]
    assert "assistant:" in subprocess.run(script, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("as_path", [True, False])
def test_a_trainer_in_python_does_the_same(
    as_path: bool, build: Path, base: Path, tmp_path: Path
) -> None:
    data = str(build) if as_path else sftprep.open_shards(build)
    trainer = make_sft_trainer(base, tmp_path, data, max_steps=1)
    trainer.train()
    trainer.save_model()
    check_tokenizer(tmp_path / "out", build)


def test_spare_rows_of_an_embedding_are_used(
    build: Path, base_tokenizer_dir: Path, tmp_path: Path
) -> None:
    base = model_folder(tmp_path / "base", base_tokenizer_dir)
    tiny_model("llama", vocab_size=640, max_position_embeddings=4096).save_pretrained(base)
    assert main(command(build, base, tmp_path / "out", "--use_peft")) == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert all(rows == NEW for rows in config["trainable_token_indices"].values())


def test_another_model_is_refused(build: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    other = model_folder(tmp_path / "other", tokenizer_dir)
    assert main(command(build, other, tmp_path / "out")) == 2
    assert not (tmp_path / "out").exists()
    trainer_of_other = tiny_model("llama", vocab_size=600)
    with pytest.raises(MismatchError, match="600 rows"):
        make_sft_trainer(trainer_of_other, tmp_path, str(build))


def test_raw_records_are_tokenized_as_by_the_build(base: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"chat_template": "chatml", "workers": 1, "max_length": 64}
    sftprep.build(CHATS, tokenizer=str(base), output=tmp_path / "build", **settings)
    trainer = make_sft_trainer(base, tmp_path, CHATS, chat_template_path="chatml", max_steps=1)
    expected = sequences(sftprep.open_shards(tmp_path / "build"))
    assert sequences(trainer.train_dataset) == expected
    assert trainer.model.get_input_embeddings().weight.shape[0] == 602
    trainer.train()
    trainer.save_model()
    check_tokenizer(tmp_path / "out", tmp_path / "build")


def test_markers_of_a_template_file_are_tokens_in_a_trainer_too(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.write_text("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|stop|>{% endfor %}")
    trainer = make_sft_trainer(base, tmp_path, CHATS, chat_template_path=str(file))
    tokenizer = trainer.processing_class
    assert {"<|user|>", "<|assistant|>", "<|stop|>"} <= set(tokenizer.get_vocab())
    assert tokenizer.eos_token == "<|stop|>"
    assert trainer.model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_a_stream_of_a_run_has_the_template(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "raw.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    flags = ["--model", str(base), "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    more = ["--max_steps", "2", "--chat_template_path", "chatml", "--max_length", "64"]
    assert main(["run", "--stream", str(path), *flags, *more]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == NEW


@pytest.mark.parametrize("more", [(), ("--use_peft",)], ids=["full", "adapter"])
def test_a_run_with_new_rows_is_resumed(
    more: tuple[str, ...], build: Path, base: Path, tmp_path: Path
) -> None:
    flags = ("--save_steps", "1", "--lr_scheduler_type", "constant", *more)
    assert main(command(build, base, tmp_path / "out", *flags)) == 0
    longer = ("--max_steps", "3", "--resume_from_checkpoint", "latest", *flags)
    assert main(command(build, base, tmp_path / "out", *longer)) == 0
    assert (tmp_path / "out" / "checkpoint-3").is_dir()
    check_tokenizer(tmp_path / "out", build)
