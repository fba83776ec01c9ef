"""Training on a stream: equal to training on the build of the same records; exact resuming."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from sftprep import BuildConfig, build
from sftprep.errors import ConfigError, MismatchError
from sftprep.stream import PackedStream
from sfttrain import SFTConfig, SFTTrainer
from sfttrain.cli.main import main
from tests.preloaded_python import run_ranks
from tests.stream.plain_packs import rows

BATCHES = 14
"""Batches of a pass over the corpus, of ten packs each."""
SETTINGS = {"max_length": 128, "pack_window": 40, "lanes": 4}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = Path(tmp_path_factory.mktemp("raw")) / "data.jsonl"
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in rows("prompt-completion", 200)), encoding="utf-8"
    )
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> str:
    """Return the folder of a tiny model with a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    set_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    LlamaForCausalLM(
        LlamaConfig(vocab_size=600, max_position_embeddings=256, **sizes)
    ).save_pretrained(folder)
    for file in tokenizer_dir.iterdir():
        shutil.copy(file, folder)
    return str(folder)


def trainer_of(source, model: str, out: Path, **settings) -> SFTTrainer:
    chosen = {
        "max_steps": 12,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "use_cpu": True,
        "learning_rate": 0.05,
    }
    chosen |= {
        "optim": "sgd",
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "disable_tqdm": True,
    }
    return SFTTrainer(
        model, SFTConfig(output_dir=str(out), **{**chosen, **settings}), train_dataset=source
    )


def losses(trainer: SFTTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def stream_of(corpus: str, model: str, **more) -> PackedStream:
    return PackedStream(corpus, config=BuildConfig.of(tokenizer=model, **SETTINGS), **more)


def test_losses_equal_those_of_the_build(corpus, model, tmp_path):
    config = BuildConfig.of(
        inputs=corpus, tokenizer=model, output=str(tmp_path / "packs"), order="keep", **SETTINGS
    )
    build(config)
    built = trainer_of(str(tmp_path / "packs"), model, tmp_path / "a")
    built.train()
    streamed = trainer_of(stream_of(corpus, model), model, tmp_path / "b", dataloader_num_workers=2)
    streamed.train()
    assert len(losses(built)) == 12
    assert losses(streamed) == pytest.approx(losses(built), rel=1e-6)
    assert streamed.trained_tokens == built.trained_tokens


@pytest.mark.parametrize(("saved", "order"), [(5, "keep"), (40, "shuffle")])
def test_a_resumed_run_continues_with_the_next_pack(saved, order, corpus, model, tmp_path):
    # The second checkpoint is in the second pass.
    steps = {"max_steps": saved + 5, "gradient_accumulation_steps": 2}
    straight = trainer_of(
        stream_of(corpus, model, order=order),
        model,
        tmp_path / "a",
        save_strategy="steps",
        save_steps=saved,
        **steps,
    )
    straight.train()
    state = json.loads((tmp_path / "a" / f"checkpoint-{saved}" / "stream_state-0.json").read_text())
    assert state["state"]["epoch"] == (0 if saved == 5 else 1)
    resumed = trainer_of(
        stream_of(corpus, model, order=order),
        model,
        tmp_path / "b",
        dataloader_num_workers=2,
        **steps,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{saved}"))
    assert losses(resumed) == pytest.approx(losses(straight), rel=1e-6)
    assert resumed.trained_tokens == straight.trained_tokens
    other = trainer_of(
        stream_of(corpus, model, window=41, order=order), model, tmp_path / "c", **steps
    )
    with pytest.raises(MismatchError):
        other.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{saved}"))


def logs_of(corpus: str, model: str, out: Path, *, accumulation: int, steps: int) -> list[dict]:
    """Return the logged steps of a run that changes no weight."""
    trainer = trainer_of(
        stream_of(corpus, model, order="keep"), model, out, learning_rate=0.0, max_steps=steps,
        gradient_accumulation_steps=accumulation, per_device_train_batch_size=10,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == steps
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_an_incomplete_last_step_of_a_pass_is_a_step_of_its_own(corpus, model, tmp_path):
    """No gradients are left for the next step, and a pass shorter than a step does not hang."""
    single = logs_of(corpus, model, tmp_path, accumulation=1, steps=2 * BATCHES)
    totals = [0, *(entry["num_tokens"] for entry in single)]
    tokens = [after - before for before, after in itertools.pairwise(totals)]
    for accumulation in (3, 5, 20):
        expected = []
        for begin in (0, BATCHES):
            for first in range(begin, begin + BATCHES, accumulation):
                part = slice(first, min(first + accumulation, begin + BATCHES))
                pairs = zip(single[part], tokens[part], strict=True)
                expected.append(sum(entry["loss"] * n for entry, n in pairs) / sum(tokens[part]))
        found = logs_of(corpus, model, tmp_path, accumulation=accumulation, steps=len(expected))
        assert [entry["loss"] for entry in found] == pytest.approx(expected, rel=1e-5)
        assert found[-1]["num_tokens"] == totals[-1]


def test_a_resume_after_an_incomplete_last_step_starts_the_next_pass(corpus, model, tmp_path):
    whole = -(-BATCHES // 5)
    options = {
        "gradient_accumulation_steps": 5,
        "max_steps": whole + 2,
        "per_device_train_batch_size": 10,
    }
    straight = trainer_of(
        stream_of(corpus, model), model, tmp_path / "a",
        save_strategy="steps", save_steps=whole, **options,
    )  # fmt: skip
    straight.train()
    resumed = trainer_of(stream_of(corpus, model), model, tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{whole}"))
    assert losses(resumed) == pytest.approx(losses(straight), rel=1e-6)
    assert resumed.trained_tokens == straight.trained_tokens


@pytest.mark.parametrize("saved", [2, BATCHES + 1])
def test_a_resumed_run_continues_with_the_same_random_numbers(saved, corpus, model, tmp_path):
    """The random numbers of dropout and of the noise on embeddings."""
    options = {
        "neftune_noise_alpha": 5.0,
        "max_steps": saved + 2,
        "per_device_train_batch_size": 10,
    }
    straight = trainer_of(
        stream_of(corpus, model), model, tmp_path / "a",
        save_strategy="steps", save_steps=saved, **options,
    )  # fmt: skip
    straight.train()
    resumed = trainer_of(stream_of(corpus, model), model, tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{saved}"))
    assert losses(resumed) == losses(straight)


def flags(model: str, out: Path, *more: str) -> list[str]:
    return [
        "run",
        "--model",
        model,
        "--output_dir",
        str(out),
        "--use_cpu",
        "--max_length",
        "128",
        "--logging_steps",
        "1",
        *more,
    ]


def test_the_command_trains_on_a_stream(corpus, model, tmp_path, capsys):
    more = (
        "--stream",
        corpus,
        "--max_steps",
        "3",
        "--stream_window",
        "40",
        "--stream_lanes",
        "4",
        "--json",
    )
    assert main(flags(model, tmp_path / "out", *more)) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["steps"] == 3
    assert summary["trained_tokens"] > 1000
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out").num_parameters() > 0


def test_quarantined_records_are_reported(model, tmp_path, capsys):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows("text", 200)) + '{"text": 1}\n')
    more = (
        "--stream",
        str(path),
        "--max_steps",
        "2",
        "--stream_order",
        "keep",
        "--stream_lanes",
        "1",
    )
    assert main(flags(model, tmp_path / "out", *more, "--on_bad_record", "quarantine")) == 0
    assert "quarantined records of the stream: 1" in capsys.readouterr().out
    assert main(flags(model, tmp_path / "out", *more, "--on_bad_record", "error")) == 2
    assert f"{path}:201" in capsys.readouterr().err


def test_the_command_rejects_streams_without_a_limit_and_for_evaluation(
    corpus, model, tmp_path, capsys
):
    assert main(flags(model, tmp_path / "out", "--stream", corpus)) == 2
    assert "--max_steps" in capsys.readouterr().err
    assert (
        main(
            [
                *flags(model, tmp_path / "out", "--max_steps", "1", "--stream", corpus),
                "--data",
                "DIR",
            ]
        )
        == 2
    )
    assert "--stream and DIR" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="an evaluation set is a stream"):
        SFTTrainer(
            model,
            SFTConfig(output_dir=str(tmp_path), max_steps=1, use_cpu=True),
            train_dataset=stream_of(corpus, model),
            eval_dataset=stream_of(corpus, model),
        )


def summary_of(printed: str, out: Path) -> dict:
    """Return the JSON summary of a run, with the logged losses."""
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return {
        **json.loads(printed.strip().splitlines()[-1]),
        "losses": [e["loss"] for e in history if "loss" in e],
    }


def run_on_two_ranks(arguments: list[str], out: Path) -> dict:
    done = run_ranks(2, "-m", "sfttrain", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return summary_of(done.stdout, out)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
def test_two_ranks_resume_from_a_checkpoint_of_one(corpus, model, tmp_path, capsys):
    def command(out: str, *more: str) -> list[str]:
        size = (
            "--stream_window",
            "40",
            "--stream_lanes",
            "4",
            "--per_device_train_batch_size",
            "1",
            "--max_steps",
            "8",
            "--json",
        )
        return flags(
            model,
            tmp_path / out,
            "--stream",
            corpus,
            *size,
            "--optim",
            "sgd",
            "--learning_rate",
            "0.05",
            *more,
        )

    assert main(command("one", "--gradient_accumulation_steps", "2", "--save_steps", "4")) == 0
    one = summary_of(capsys.readouterr().out, tmp_path / "one")
    two = run_on_two_ranks(
        command("two", "--resume_from_checkpoint", str(tmp_path / "one" / "checkpoint-4")),
        tmp_path / "two",
    )
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert two["trained_tokens"] == one["trained_tokens"]
