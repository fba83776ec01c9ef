"""Several processes train as one run: the same steps and losses, and every pack once."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sfttrain.cli.main import main
from tests.preloaded_python import run_ranks
from tests.sfttrain.builds import write_build
from tests.sfttrain.packs import make_packs
from tests.sfttrain.tiny import tiny_model


def train(folder: Path, out: str, ranks: int, *more: str) -> dict[str, Any]:
    """Run `sfttrain run` with `ranks` processes, and return its JSON summary and logged losses.

    A single rank runs in this process.
    """
    arguments = [
        *("run", str(folder / "packs"), "--model", str(folder / "model"), "--json"),
        *(
            "--output_dir",
            str(folder / out),
            "--use_cpu",
            "--logging_steps",
            "1",
            "--optim",
            "sgd",
            "--learning_rate",
            "0.05",
        ),
        *(
            "--per_device_train_batch_size",
            "1",
            "--gradient_accumulation_steps",
            str(4 // ranks),
            "--num_train_epochs",
            "1",
            *more,
        ),
    ]
    if ranks == 1:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            assert main(arguments) == 0
        said = printed.getvalue()
    else:
        done = run_ranks(ranks, "-m", "sfttrain", *arguments)
        assert done.returncode == 0, done.stderr[-3000:]
        said = done.stdout
    summary: dict[str, Any] = json.loads(said.strip().splitlines()[-1])
    state = json.loads((folder / out / "trainer_state.json").read_text())
    summary["losses"] = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    return summary


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
def test_two_ranks_train_as_one_and_resume_from_each_other(tmp_path: Path) -> None:
    # 13 packs in steps of 4: in the last step one rank of two has none left. The shards have 4
    # lanes, and two ranks share the packs of a step by their costs.
    write_build(
        tmp_path / "packs",
        make_packs(13),
        tokenizer={"name": "", "fingerprint": ""},
        shard_packs=3,
    )
    tiny_model("llama").save_pretrained(tmp_path / "model")
    one = train(tmp_path, "one", 1, "--save_steps", "2", "--eval_data", str(tmp_path / "packs"))
    two = train(tmp_path, "two", 2, "--eval_data", str(tmp_path / "packs"))
    resumed = train(
        tmp_path, "resumed", 2, "--resume_from_checkpoint", str(tmp_path / "one" / "checkpoint-2")
    )
    assert one["steps"] == two["steps"] == 4
    for other in (two, resumed):
        assert other["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert other["trained_tokens"] == one["trained_tokens"]
    for name in ("eval_loss", "eval_mean_token_accuracy", "eval_num_tokens"):
        assert two["evaluation"][name] == pytest.approx(one["evaluation"][name], rel=1e-5)
    wanted = load_file(tmp_path / "one" / "model.safetensors")
    for out in ("two", "resumed"):
        for name, value in load_file(tmp_path / out / "model.safetensors").items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)
