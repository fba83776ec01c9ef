"""A TRL script in several processes: one prepares the data while the others wait, and all train as
one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.preloaded_python import run_python, run_ranks
from tests.sfttrain.trainer_factory import TEXTS, model_folder, write_lines

SCRIPT = """
import json, os, sys, time
from datasets import load_dataset
from sfttrain import SFTConfig, SFTTrainer
import sfttrain.data.prepare as prepare

model, data, out = sys.argv[1:4]
rows, slow = int(sys.argv[4]), float(sys.argv[5])
built = []
run_build = prepare.run_build
def noted(settings, **options):
    time.sleep(slow)
    built.append(options["name"])
    run_build(settings, **options)
prepare.run_build = noted

dataset = load_dataset("json", data_files=data, split="train")
args = SFTConfig(
    out, dataset_cache_dir=out, use_cpu=True, per_device_train_batch_size=rows, num_train_epochs=2,
    logging_steps=1, optim="sgd", learning_rate=0.05, save_strategy="no", disable_tqdm=True,
    ddp_timeout=60,
)
code = 0
try:
    held = {"again": dataset.select(range(3))}
    trainer = SFTTrainer(model, args=args, train_dataset=dataset, eval_dataset=held)
    trainer.train()
    said = {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "eval": trainer.evaluate()["eval_again_loss"],
        "built": built,
        "rank": args.process_index,
    }
except Exception as error:
    said, code = {"error": str(error).splitlines()[0], "rank": args.process_index}, 3
sys.stdout.write("SAID " + json.dumps(said) + "\\n")
sys.stdout.flush()
os._exit(code)  # taking gloo's process group down may hang (torch 2.13)
"""


def run(
    folder: Path, ranks: int, data: str, *, rows: int, slow: float = 0.0, fails: bool = False
) -> list[dict[str, Any]]:
    """Run the script, and return the output of each process by its rank."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    paths = [str(script), str(folder / "model"), data, str(folder / f"out{ranks}")]
    arguments = [*paths, str(rows), str(slow)]
    done = (
        run_ranks(ranks, *arguments, cwd=folder)
        if ranks > 1
        else run_python(*arguments, cwd=folder)
    )
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    said = [
        json.loads(line.partition("SAID ")[2])
        for line in done.stdout.splitlines()
        if "SAID " in line
    ]
    return sorted(said, key=lambda each: each["rank"])


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
def test_two_ranks_prepare_once_and_train_as_one(tmp_path: Path, tokenizer_dir: Path) -> None:
    model_folder(tmp_path / "model", tokenizer_dir)
    data = write_lines(tmp_path / "rows.jsonl", TEXTS * 2)
    (one,) = run(tmp_path, 1, data, rows=4)
    first, second = run(tmp_path, 2, data, rows=2, slow=1.0)
    assert (first["built"], second["built"]) == (["train_dataset", "again"], [])
    for rank in (first, second):
        assert rank["eval"] == pytest.approx(one["eval"], rel=1e-4)
    assert first["losses"] == pytest.approx(one["losses"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
def test_a_bad_record_ends_every_rank(tmp_path: Path, tokenizer_dir: Path) -> None:
    model_folder(tmp_path / "model", tokenizer_dir)
    data = write_lines(tmp_path / "rows.jsonl", [*TEXTS, {"text": ""}, {"text": None}])
    said = run(tmp_path, 2, data, rows=2, fails=True)
    assert said
    assert all(f"train_dataset:{len(TEXTS) + 2}: " in each["error"] for each in said)
