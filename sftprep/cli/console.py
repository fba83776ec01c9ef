"""Output of the commands: JSON, and their progress."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from typing import Any


def uses_color(wanted: bool | None) -> bool:
    """Return whether to use colors on stdout.

    Args:
        wanted: What a flag says; None: on a terminal, unless NO_COLOR is set.
    """
    if wanted is not None:
        return wanted
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def print_json(data: Any) -> None:
    print(json.dumps(data, indent=1, ensure_ascii=False))


_FIRST_STAGE = "prepare"
"""The stage that is shown until there is something to count. The first use of a tokenizer takes
some seconds."""
_STAGES_IN_BYTES = frozenset({"tokenize", "upload"})
_UNITS = {"export": "packs"}
"""What other stages count, unless it is shards."""
_SECONDS_BETWEEN_LINES = 10.0


@dataclass(slots=True)
class StageProgress:
    """How far a stage has come.

    Attributes:
        stage: Its name.
        done: The bytes, shards or packs that are done.
        total: All of them.
        done_before: Those that were done at the start, by an earlier run.
        seconds: The time since the start of the stage.
    """

    stage: str
    done: int = 0
    total: int = 0
    done_before: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        """Return the state in words.

        Example:
            tokenize: 41.2 of 200.0 MB (21 %), 8.3 MB/s, 0:19 left
        """
        in_bytes = self.stage in _STAGES_IN_BYTES
        if in_bytes:
            amount = f"{self.done / 1e6:,.1f} of {self.total / 1e6:,.1f} MB"
        else:
            amount = f"{self.done:,} of {self.total:,} {_UNITS.get(self.stage, 'shards')}"
        parts = [f"{amount} ({100 * self.done // max(1, self.total)} %)"]
        rate = (self.done - self.done_before) / self.seconds if self.seconds else 0
        if rate:
            parts += [f"{rate / 1e6:,.1f} MB/s"] if in_bytes else []
            left = round((self.total - self.done) / rate)
            parts.append(f"{left // 60}:{left % 60:02d} left")
        return f"{self.stage}: {', '.join(parts)}"


class ProgressBar:
    """The progress of a command, on stderr.

    It is a bar on a terminal. Elsewhere, as in the log of a job, it is a line every ten seconds.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._is_terminal = not quiet and sys.stderr.isatty()
        self._prints_lines = not quiet and not self._is_terminal
        self._bar: Any = None  # the bar of rich, while it is shown
        self._tasks: dict[str, Any] = {}  # the task of rich for each stage
        self._state = StageProgress(_FIRST_STAGE)
        self._started = self._printed = time.monotonic()

    def __enter__(self) -> ProgressBar:
        if self._is_terminal:
            # Imported only where a bar is shown, to keep the command fast.
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (BarColumn(), TextColumn("{task.description}", markup=False))
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._tasks[_FIRST_STAGE] = self._bar.add_task(_FIRST_STAGE, total=None)
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is not None and issubclass(kind, KeyboardInterrupt) and self._state.total:
            print(f"stopped at {self._state}", file=sys.stderr)

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show the progress of a stage, with the signature of `Progress`."""
        now = time.monotonic()
        if stage != self._state.stage:
            # What an earlier run has finished is reported at once, and says nothing of the speed.
            self._state, self._started = StageProgress(stage, done_before=done), now
        self._state.done, self._state.total = done, total
        self._state.seconds = now - self._started
        if self._prints_lines and now - self._printed >= _SECONDS_BETWEEN_LINES:
            self._printed = now
            print(self._state, file=sys.stderr, flush=True)
        if self._bar is not None:
            self._show_bar()

    def print_line(self, text: str) -> None:
        """Print a line above the bar, or among the lines of the progress."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self._prints_lines:
            print(text, file=sys.stderr, flush=True)

    def _show_bar(self) -> None:
        # The stages that are done stay, each with a bar of its own.
        state = self._state
        if _FIRST_STAGE in self._tasks:
            self._bar.remove_task(self._tasks.pop(_FIRST_STAGE))
        if state.stage not in self._tasks:
            self._tasks[state.stage] = self._bar.add_task("", total=None)
        task = self._tasks[state.stage]
        self._bar.update(task, description=str(state), completed=state.done, total=state.total)
