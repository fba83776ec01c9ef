"""Progress of a run for people: a line per log entry, and a progress bar.

The bar is shown on a terminal only.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, TextIO

from transformers import TrainerCallback


class Console(TrainerCallback):  # type: ignore[misc]
    """A callback for writing the progress of a run.

    Args:
        first_lines: The lines to write when training begins.
        out: The destination; stderr by default, because stdout is reserved for the summary.
    """

    def __init__(self, first_lines: Sequence[str] = (), out: TextIO | None = None) -> None:
        self._first_lines = first_lines
        self._out = out if out is not None else sys.stderr
        self._bar: Any = None  # rich's Progress, while training runs on a terminal

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the first lines, and start the bar."""
        if not state.is_world_process_zero:
            return
        for line in self._first_lines:
            print(line, file=self._out, flush=True)
        if self._out.isatty():
            # Imported here, because a run without a terminal does not need rich.
            from rich.console import Console as Terminal
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

            self._bar = Progress(
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Terminal(file=self._out),
                transient=True,
            )
            self._bar.add_task("", total=state.max_steps, completed=state.global_step)
            self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Advance the bar."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=state.global_step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        """Write a line for an entry of training or evaluation."""
        line = log_line(state.global_step, state.max_steps, logs or {})
        if not line or not state.is_world_process_zero:
            return
        if self._bar is not None:
            self._bar.console.print(line, highlight=False)
        else:
            print(line, file=self._out, flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def log_line(step: int, steps: int, logs: dict[str, float]) -> str:
    """Return the line for a log entry of training or evaluation; "" for others.

    Args:
        step: The current step.
        steps: The number of steps of the run.
        logs: The entry. Several evaluation sets give one line each.
    """
    position = f"step {step:>{len(str(steps))}}/{steps}"
    if "loss" in logs:
        return (
            f"{position}  loss {logs['loss']:.4f}  accuracy {logs['mean_token_accuracy']:.1%}  lr"
            f" {logs['learning_rate']:.1e}  {logs['tokens_per_second']:,.0f} trained tok/s "
            f" {logs['num_tokens']:,.0f} trained tokens"
        )
    evaluations = [
        name.removesuffix("_loss")
        for name in logs
        if name.startswith("eval") and name.endswith("_loss")
    ]
    return "\n".join(
        f"{position}  {name} loss {logs[f'{name}_loss']:.4f}"
        f"  perplexity {logs[f'{name}_perplexity']:.2f}"
        f"  accuracy {logs[f'{name}_mean_token_accuracy']:.1%}"
        for name in evaluations
    )
