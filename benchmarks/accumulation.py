"""Gradient accumulation: the same packs in a step, divided into different numbers of micro-batches.

python -m benchmarks.accumulation           # two minutes
python -m benchmarks.accumulation --steps 2
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, set_seed

from benchmarks.packing import machine_line
from sfttrain import SFTConfig, SFTTrainer

EPILOG = """
columns
  packs, micro-batches  their product is the number of packs in a step
  loss, norm            largest difference of the loss, and of the norm of the gradient, at a step
                        to those of one micro-batch, relative
  weights               largest difference of a weight after the last step, relative to the largest
                        change of a weight in the run
  time                  CPU time of the steps, relative to one micro-batch
"""

STEP_PACKS, VOCABULARY = 16, 4096


@dataclass(frozen=True)
class Run:
    """The result of a run."""

    losses: np.ndarray
    norms: np.ndarray
    weights: torch.Tensor
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens of a pack")
    arguments = parser.parse_args()
    print(machine_line())
    torch.set_num_threads(1)
    rows = make_rows(arguments.steps * STEP_PACKS, arguments.length)
    start = flat_weights(make_model())
    train(rows, 1, steps=1)  # imports and first allocations are not measured
    whole = train(rows, 1, steps=arguments.steps)
    print(f"{'packs':>6}{'micro-batches':>15}{'loss':>10}{'norm':>10}{'weights':>10}{'time':>7}")
    for micro_batches in (1, 2, 4, 8, 16):
        run = whole if micro_batches == 1 else train(rows, micro_batches, steps=arguments.steps)
        change = (run.weights - whole.weights).abs().max() / (whole.weights - start).abs().max()
        print(
            f"{STEP_PACKS // micro_batches:>6}{micro_batches:>15}"
            f"{np.max(np.abs(run.losses / whole.losses - 1)):>10.1e}"
            f"{np.max(np.abs(run.norms / whole.norms - 1)):>10.1e}"
            f"{change:>10.1e}{run.seconds / whole.seconds:>7.2f}"
        )


def make_rows(count: int, length: int) -> list[dict[str, Any]]:
    """Return packs of sequences of random lengths, of which random parts are trained."""
    numbers = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        cuts = np.sort(numbers.choice(np.arange(1, length), size=3, replace=False))
        rows.append(
            {
                "input_ids": numbers.integers(3, VOCABULARY, length).tolist(),
                "completion_mask": (numbers.random(length) < numbers.random()).tolist(),
                "seq_lengths": np.diff([0, *cuts, length]).tolist(),
            }
        )
    return rows


def make_model() -> LlamaForCausalLM:
    """Return a small Llama, the same at each call."""
    set_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
        )
    )


def flat_weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def train(rows: list[dict[str, Any]], micro_batches: int, *, steps: int) -> Run:
    """Train with the packs of each step divided into micro-batches."""
    model = make_model()
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            str(Path(folder) / "out"),
            per_device_train_batch_size=STEP_PACKS // micro_batches,
            gradient_accumulation_steps=micro_batches,
            max_steps=steps,
            logging_steps=1,
            learning_rate=1.0,
            optim="sgd",  # Adam would turn the rounding of gradients near 0 into whole steps
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = SFTTrainer(model, config, train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        begin = time.process_time()
        trainer.train()
        seconds = time.process_time() - begin
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return Run(
        np.array([entry["loss"] for entry in history]),
        np.array([entry["grad_norm"] for entry in history]),
        flat_weights(model),
        seconds,
    )


if __name__ == "__main__":
    main()
