"""Output of the command: JSON, and a progress bar."""

from __future__ import annotations

import json
import sys
from typing import Any


def print_json(data: Any) -> None:
    print(json.dumps(data, indent=1, ensure_ascii=False))


_FIRST_STAGE = "prepare"
"""The stage that is shown until there is something to count. The first use of a tokenizer takes
some seconds."""


class ProgressBar:
    """A progress bar on a terminal; nothing elsewhere."""

    def __init__(self, *, quiet: bool) -> None:
        self._is_shown = not quiet and sys.stderr.isatty()
        self._progress: Any = None  # the bar of rich, while it is shown
        self._tasks: dict[str, Any] = {}  # the task of rich for each stage

    def __enter__(self) -> ProgressBar:
        if self._is_shown:
            # Imported only where a bar is shown, to keep the command fast.
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                Progress,
                TaskProgressColumn,
                TextColumn,
                TimeRemainingColumn,
            )

            columns = (
                TextColumn("{task.description:<9}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
            self._tasks[_FIRST_STAGE] = self._progress.add_task(_FIRST_STAGE, total=None)
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show the progress of a stage, with the signature of `Progress`."""
        if self._progress is None:
            return
        if _FIRST_STAGE in self._tasks:
            self._progress.remove_task(self._tasks.pop(_FIRST_STAGE))
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._tasks[stage], completed=done, total=total)
