"""One side of the training benchmark: a process that trains one step per request.

    python -m benchmarks.training_side SIDE        # started by benchmarks/train_vs_trl.py

The protocol has one JSON object per line. Standard input brings the task, and then one line for
each step to train. Standard output answers {"ready": true}, {"seconds": ...} after each step, and
{"result": {...}} at the end.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Task:
    """Training that all sides perform."""

    model: str
    """Folder of the model from which all sides start."""
    masked: float
    """Share of each sequence that is a prompt, and not trained."""
    steps: int
    """Optimizer steps in an epoch of packs."""
    length: int
    """Largest length of a pack in tokens."""
    vocabulary: int
    """Number of token ids."""
    bf16: bool
    """Whether mixed precision is used on a CPU too."""
    threads: int
    """Threads of torch."""
    keep_memory: bool
    """Whether malloc keeps freed memory."""
    clock: str
    """wall or cpu."""


def sequences(task: Task) -> list[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
    """Return token ids and mask of trained tokens for each sequence.

    Lengths are chat-like (mean about 310), tokens follow Zipf's law, and each sequence starts with
    its prompt. The sequences almost fill `steps` packs, so that an epoch of packs has that many
    steps.
    """
    random = np.random.default_rng(0)
    found: list[tuple[NDArray[np.int32], NDArray[np.bool_]]] = []
    remaining = task.steps * (task.length - task.length // 64)
    while remaining > 16:
        length = int(min(np.clip(random.lognormal(5.4, 0.85), 16, task.length), remaining))
        words = 10 + (random.zipf(1.2, length) % (task.vocabulary - 20))
        found.append((words.astype(np.int32), np.arange(length) >= round(task.masked * length)))
        remaining -= length
    return found


def run_side(side: str) -> None:
    """Create the trainer of a side, and train one step for each line on standard input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries must not mix with the answers
    task = Task(**json.loads(sys.stdin.readline()))
    import torch

    torch.set_num_threads(task.threads)
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[task.clock]
    counts: list[tuple[int, int]] = []  # trained tokens and all tokens of each batch
    trainer = (_make_ours if side == "ours" else _make_trl)(side, task)
    train_step = trainer.training_step

    def counting_step(model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        labels = inputs["labels"]
        real = (
            inputs["attention_mask"].sum()
            if "attention_mask" in inputs
            else torch.tensor(inputs["input_ids"].numel())
        )
        counts.append((int((labels[..., 1:] != -100).sum()), int(real)))
        return train_step(model, inputs, *rest, **options)

    trainer.training_step = counting_step

    def answer(value: dict[str, Any]) -> float:
        print(json.dumps(value), file=answers, flush=True)
        sys.stdin.readline()
        return clock()

    trainer.add_callback(_make_callback(answer, clock))
    trainer.train()
    cuda = torch.cuda.is_available()
    peak = (
        torch.cuda.max_memory_allocated()
        if cuda
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    result = {
        "trained_by_step": [n for n, _ in counts],
        "trained": sum(n for n, _ in counts),
        "tokens": sum(n for _, n in counts),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "trained_at": np.cumsum([n for n, _ in counts]).tolist(),
        "peak_bytes": peak,
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {task.threads} threads",
    }
    print(json.dumps({"result": result}), file=answers, flush=True)


def _make_callback(answer: Any, clock: Any) -> Any:
    """Return a callback that reports the time of each step, and waits for the next request."""
    import torch
    from transformers import TrainerCallback

    class StepByStep(TrainerCallback):  # type: ignore[misc]
        resumed = 0.0  # time of the last request

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.resumed = answer({"ready": True})

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in (logs or {}):  # after a step, its logging included
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                self.resumed = answer({"seconds": clock() - self.resumed})

    return StepByStep()


def _settings(task: Task) -> dict[str, Any]:
    import torch

    return {
        "output_dir": task.model + "-out",  # sfttrain does not write into the folder of its model
        "num_train_epochs": 1,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": task.bf16 or torch.cuda.is_available(),
        "gradient_checkpointing": False,
    }


def _make_ours(_side: str, task: Task) -> Any:
    from types import SimpleNamespace

    from sftprep import pack_lengths
    from sfttrain import SFTConfig, SFTTrainer

    rows = sequences(task)
    plan = pack_lengths([len(ids) for ids, _ in rows], task.length)

    class Packs:
        def __len__(self) -> int:
            return int(plan.num_bins)

        def __getitem__(self, index: int) -> Any:
            members = plan.members[plan.offsets[index] : plan.offsets[index + 1]].tolist()
            return SimpleNamespace(
                input_ids=np.concatenate([rows[m][0] for m in members]),
                completion_mask=np.concatenate([rows[m][1] for m in members]),
                seq_lengths=self.seq_lengths(index),
            )

        def seq_lengths(self, index: int) -> Any:
            members = plan.members[plan.offsets[index] : plan.offsets[index + 1]].tolist()
            return np.array([len(rows[m][0]) for m in members], np.int32)

    arguments = SFTConfig(per_device_train_batch_size=1, **_settings(task))
    return SFTTrainer(task.model, arguments, train_dataset=Packs())


def _make_trl(side: str, task: Task) -> Any:
    from importlib.util import find_spec

    import datasets
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    rows = sequences(task)
    columns = {
        "input_ids": [ids.tolist() for ids, _ in rows],
        "labels": [np.where(mask, ids, -100).tolist() for ids, mask in rows],
    }
    # A padded batch has the same number of sequences as a pack, so that a step trains on the same
    # number of tokens.
    batch = 1 if side == "packed" else max(1, round(len(rows) / task.steps))
    arguments = SFTConfig(
        per_device_train_batch_size=batch,
        max_length=task.length,
        packing=side == "packed",
        eos_token=None,
        **_settings(task),
    )
    from tokenizers import Tokenizer, models

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(
            models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>")
        ),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )
    # TRL recommends flash attention for packing.
    flash = torch.cuda.is_available() and find_spec("flash_attn") is not None
    return SFTTrainer(
        AutoModelForCausalLM.from_pretrained(
            task.model, attn_implementation="flash_attention_2" if flash else None
        ),
        args=arguments,
        train_dataset=datasets.Dataset.from_dict(columns),
        processing_class=tokenizer,
    )


if __name__ == "__main__":
    run_side(sys.argv[1])
