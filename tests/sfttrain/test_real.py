"""A real dataset, tokenizer and small model, from the records to the trained model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import sftprep
from sfttrain.cli.main import main
from tests.support import SHARED, needs_shared

MODEL = SHARED / "models" / "stories260k"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def build(folder: Path, tokenizer: Path) -> Path:
    """Build packs of 240 questions of gsm8k as chats."""
    rows = [
        json.loads(line)
        for line in (SHARED / "datasets" / "gsm8k_train.jsonl").read_text().splitlines()[:240]
    ]
    chats = [
        {
            "messages": [
                {"role": "user", "content": r["question"]},
                {"role": "assistant", "content": r["answer"]},
            ]
        }
        for r in rows
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (folder / "chatml.jinja").write_text(CHATML)
    config = sftprep.BuildConfig.of(
        inputs=str(folder / "chats.jsonl"),
        tokenizer=str(tokenizer),
        chat_template=str(folder / "chatml.jinja"),
        max_length=512,
        output=str(folder / "packs"),
        workers=1,
    )
    sftprep.build(config)
    return folder / "packs"


@pytest.mark.slow
@needs_shared
def test_a_real_model_learns_real_chats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    packs = build(tmp_path, MODEL)
    arguments = [
        *(
            "run",
            str(packs),
            "--model",
            str(MODEL),
            "--output_dir",
            str(tmp_path / "out"),
            "--use_cpu",
            "--json",
        ),
        *(
            "--max_steps",
            "40",
            "--per_device_train_batch_size",
            "2",
            "--learning_rate",
            "4e-3",
            "--logging_steps",
            "5",
        ),
    ]
    assert main(arguments) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["first_loss"] > 4
    assert summary["last_loss"] < 3
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == CHATML
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "How many?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    assert model.generate(**prompt, max_new_tokens=8).shape[1] > prompt["input_ids"].shape[1]


@needs_shared
def test_an_adapter_on_a_real_model_loads_in_peft(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    packs = build(tmp_path, MODEL)
    arguments = [
        *(
            "run",
            str(packs),
            "--model",
            str(MODEL),
            "--output_dir",
            str(tmp_path / "out"),
            "--use_cpu",
            "--json",
            "--use_peft",
        ),
        *(
            "--max_steps",
            "20",
            "--per_device_train_batch_size",
            "2",
            "--learning_rate",
            "1e-2",
            "--logging_steps",
            "5",
        ),
    ]
    assert main(arguments) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["kind"] == "adapter"
    assert summary["last_loss"] < summary["first_loss"] - 1
    base = AutoModelForCausalLM.from_pretrained(MODEL)
    # The tokenizer of the build has the tokens of the template, which that of the model lacks.
    base.resize_token_embeddings(len(AutoTokenizer.from_pretrained(tmp_path / "out")))
    ids = torch.arange(300, 330)[None]
    with torch.no_grad():
        before = base(input_ids=ids).logits
        after = PeftModel.from_pretrained(base, str(tmp_path / "out"))(input_ids=ids).logits
    assert not torch.allclose(before, after, atol=0.1)


@needs_shared
def test_shards_of_another_tokenizer_are_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packs = build(tmp_path, SHARED / "tokenizers" / "tiny-chatml-4k")
    arguments = [
        "run",
        str(packs),
        "--model",
        str(MODEL),
        "--output_dir",
        str(tmp_path / "out"),
        "--use_cpu",
    ]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "embedding has 512 rows" in error
    assert "--tokenizer MODEL" in error
