"""Training, ours beside TRL's: the same model, the same sequences, the same trained tokens, an
epoch each.

    python -m benchmarks.train_vs_trl                     # on the GPU where there is one, else on
    the CPU python -m benchmarks.train_vs_trl --plot docs/train_vs_trl.png --steps 24

Three sides: ours, TRL with packing (bfd, its default), TRL with padding. Each lives in a process of
its own and trains one optimizer step at a time, in turn with the others, so that a busy machine
slows them alike. A step is timed from the end of the one before: loading, forward, backward,
optimizer and logging. The first step of each is left out. That all sides trained on the same number
of tokens, as targets, is checked; the memory is the highest resident set of the process (on a GPU:
the highest allocation).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

_KEEP = {
    "MALLOC_MMAP_THRESHOLD_": str(2**33),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**26),
}
SIDES = {"ours": "sfttrain", "packed": "TRL 1.16, packed", "padded": "TRL 1.16, padded"}


@dataclass(frozen=True)
class Task:
    """What every side trains."""

    model: str
    """folder of the model that all start from"""
    masked: float
    """share of each sequence that is prompt, and not trained"""
    steps: int
    length: int
    vocabulary: int
    bf16: bool
    threads: int
    keep_memory: bool
    clock: str


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--masked",
        type=float,
        nargs="+",
        default=[0.6, 0.0],
        help="shares of each sequence that are not trained",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=6,
        help="steps of an epoch of ours, or one more; the first is not counted",
    )
    parser.add_argument("--length", type=int, default=2048, help="tokens of a pack")
    parser.add_argument(
        "--hidden", type=int, default=256, help="width of the model; on a GPU take 2048 or so"
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument(
        "--bf16", action="store_true", help="mixed precision, on all sides; on a GPU always"
    )
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="threads of torch, on both sides"
    )
    parser.add_argument(
        "--default-malloc",
        action="store_true",
        help=(
            "leave glibc as it is: it gives large blocks back to the system, and on some virtual"
            " machines taking them anew costs more than the training; by default it is told to keep"
            " them, on all sides"
        ),
    )
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: processor seconds, for a machine that does other things too",
    )
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", type=Path, help="draw the loss curves into this file")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        _child(arguments.side)
        return
    with tempfile.TemporaryDirectory(prefix="sfttrain-bench-") as folder:
        _make_model(folder, arguments)
        shared = {
            "model": folder,
            "length": arguments.length,
            "vocabulary": arguments.vocabulary,
            "steps": arguments.steps,
        }
        shared |= {
            "bf16": arguments.bf16,
            "threads": arguments.threads,
            "keep_memory": not arguments.default_malloc,
        }
        shared |= {"clock": arguments.clock}
        tasks = [Task(masked=share, **shared) for share in arguments.masked]
        results = [result for task in tasks for result in compare(task, arguments.sides)]
    print(json.dumps(results, indent=1) if arguments.json else _table(results))
    if arguments.plot:
        _draw(results, arguments.plot)


def compare(task: Task, sides: list[str]) -> list[dict[str, Any]]:
    """A row of the table for each side. Raises SystemExit where they did not train on the same
    tokens."""
    children = [_Side(name, task) for name in sides]
    try:
        while any(child.running for child in children):
            for child in children:
                child.step()
        results = [child.result() for child in children]
    finally:
        for child in children:
            child.stop()
    if len({(r["trained"], r["tokens"]) for r in results}) > 1:
        raise SystemExit(
            f"not the same tokens: {[(r['side'], r['trained'], r['tokens']) for r in results]}"
        )
    for result in results:
        result["masked"] = task.masked
        result["ratio"] = results[0]["trained_per_second"] / result["trained_per_second"]
        result["memory_ratio"] = result["peak_bytes"] / results[0]["peak_bytes"]
    return results


def sequences(task: Task) -> list[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
    """Ids and mask of each sequence: chat-like lengths (mean some 310), words of Zipf's law, the
    prompt first.

    As many as fill `steps` packs all but some tokens, so that an epoch of packs has that many
    steps.
    """
    random = np.random.default_rng(0)
    found: list[tuple[NDArray[np.int32], NDArray[np.bool_]]] = []
    room = task.steps * (task.length - task.length // 64)
    while room > 16:
        length = int(min(np.clip(random.lognormal(5.4, 0.85), 16, task.length), room))
        words = 10 + (random.zipf(1.2, length) % (task.vocabulary - 20))
        found.append((words.astype(np.int32), np.arange(length) >= round(task.masked * length)))
        room -= length
    return found


class _Side:
    """One side's process, which trains a step when it is told to."""

    def __init__(self, name: str, task: Task) -> None:
        self.name, self.seconds, self._last = name, list[float](), dict[str, Any]()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.train_vs_trl", "--side", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[1],
            env={
                **os.environ,
                "OMP_NUM_THREADS": str(task.threads),
                **(_KEEP if task.keep_memory else {}),
            },
        )
        self._tell(json.dumps(asdict(task)))
        self._read()  # it is ready

    @property
    def running(self) -> bool:
        return "result" not in self._last

    def step(self) -> None:
        """Let it train a step, if it has any left."""
        if self.running:
            self._tell("step")
            self._read()
            if self.running:
                self.seconds.append(self._last["seconds"])

    def result(self) -> dict[str, Any]:
        facts: dict[str, Any] = self._last["result"]
        timed = list(zip(self.seconds[1:], facts.pop("trained_by_step")[1:], strict=True))
        speed = sum(n for _, n in timed) / sum(s for s, _ in timed)
        rates = [n / s for s, n in timed]
        return {
            "side": self.name,
            "trained_per_second": speed,
            "median_rate": median(rates),
            "steps": len(self.seconds),
            **facts,
        }

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} failed:\n{self._process.communicate()[1][-3000:]}")
        self._last = json.loads(line)


def _child(side: str) -> None:
    """One side: make the trainer, then train a step for each line on stdin."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    task = Task(**json.loads(sys.stdin.readline()))
    import torch

    torch.set_num_threads(task.threads)
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[task.clock]
    counts: list[tuple[int, int]] = []  # trained and all tokens of each batch
    trainer = (_ours if side == "ours" else _trl)(side, task)
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

    trainer.add_callback(_turns(answer, clock))
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


def _turns(answer: Any, clock: Any) -> Any:
    """A callback that says after each step how long it took, and waits until it is told to go
    on."""
    import torch
    from transformers import TrainerCallback

    class Turns(TrainerCallback):  # type: ignore[misc]
        resumed = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.resumed = answer({"ready": True})

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in (logs or {}):  # after a step, and after what its logging costs
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                self.resumed = answer({"seconds": clock() - self.resumed})

    return Turns()


def _make_model(folder: str, arguments: argparse.Namespace) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=3 * arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=max(1, arguments.hidden // 64),
        num_key_value_heads=max(1, arguments.hidden // 128),
        head_dim=64,
        max_position_embeddings=arguments.length,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


def _settings(task: Task) -> dict[str, Any]:
    import torch

    return {
        "output_dir": task.model + "/out",
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


def _ours(_side: str, task: Task) -> Any:
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


def _trl(side: str, task: Task) -> Any:
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
    # As many sequences in a padded batch as our packs have, so that a step trains on as many
    # tokens.
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
    flash = (
        torch.cuda.is_available() and find_spec("flash_attn") is not None
    )  # as TRL recommends for packing
    return SFTTrainer(
        AutoModelForCausalLM.from_pretrained(
            task.model, attn_implementation="flash_attention_2" if flash else None
        ),
        args=arguments,
        train_dataset=datasets.Dataset.from_dict(columns),
        processing_class=tokenizer,
    )


_COLUMNS = (8, 20, 7, 15, 15, 10, 13, 14)


def _table(results: list[dict[str, Any]]) -> str:
    rows = [
        (
            "masked",
            "side",
            "steps",
            "trained tok/s",
            "all tok/s",
            "peak MB",
            "sfttrain is",
            "their memory",
        )
    ]
    for r in results:
        scale = r["tokens"] / r["trained"]
        speed = (
            f"{r['trained_per_second']:,.0f}",
            f"{r['trained_per_second'] * scale:,.0f}",
            f"{r['peak_bytes'] / 1e6:,.0f}",
        )
        ratios = (
            ("", "")
            if r["side"] == "ours"
            else (f"{r['ratio']:.2f}x", f"{r['memory_ratio']:.2f}x ours")
        )
        rows.append((f"{r['masked']:.0%}", SIDES[r["side"]], str(r["steps"]), *speed, *ratios))
    lines = [
        "".join(
            text.ljust(width) if column < 2 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, _COLUMNS, strict=True))
        )
        for row in rows
    ]
    last = [f"{SIDES[r['side']]} {r['losses'][0]:.3f} → {r['losses'][-1]:.3f}" for r in results]
    return "\n".join(
        [
            *lines,
            (
                f"{results[0]['device']}; the same tokens on all sides (checked). Loss:"
                f" {'; '.join(last)}"
            ),
        ]
    )


def _draw(results: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shares = sorted({r["masked"] for r in results}, reverse=True)
    figure, panels = pyplot.subplots(
        1, len(shares), figsize=(5 * len(shares), 3.4), squeeze=False, sharey=True
    )
    for share, axes in zip(shares, panels[0], strict=True):
        for r in (r for r in results if r["masked"] == share):
            color = {"ours": "#2a7", "packed": "#c60", "padded": "#999"}[r["side"]]
            axes.plot(r["trained_at"], r["losses"], color=color, label=SIDES[r["side"]], marker=".")
        axes.set_title(f"{share:.0%} of the tokens masked")
        axes.set_xlabel("trained tokens")
    panels[0][0].set_ylabel("loss")
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
