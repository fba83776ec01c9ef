"""Who runs the passes: this process, or worker processes. The output is the same bytes either way."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from typing import Protocol, TypeVar

from sftprep.errors import WorkerError

Spec = TypeVar("Spec")
Result = TypeVar("Result")

_TRIES = 3


class Executor(Protocol):
    """Runs a function over specs, in any order; functions and specs must be such that a second run does no harm."""

    @property
    def capacity(self) -> int:
        """How many specs run at the same time."""

    def map_unordered(self, fn: Callable[[Spec], Result], specs: Iterable[Spec]) -> Iterator[Result]:
        """Results as they come; specs are taken from the iterable only as there is room for them."""

    def close(self) -> None:
        """Stop the workers; what still runs is abandoned."""


def make_executor(workers: int) -> Executor:
    """This process for one worker, a pool of `workers` processes for more."""
    return InProcess() if workers <= 1 else Processes(workers)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class InProcess:
    """One spec after the other, here."""

    capacity = 1

    def map_unordered(self, fn: Callable[[Spec], Result], specs: Iterable[Spec]) -> Iterator[Result]:
        return map(fn, specs)

    def close(self) -> None:
        return None


class Processes:
    """A pool of spawned processes. A spec whose worker died is tried again in a fresh pool, three times in all."""

    def __init__(self, workers: int) -> None:
        self.capacity = workers
        self._pool = self._fresh_pool()

    def map_unordered(self, fn: Callable[[Spec], Result], specs: Iterable[Spec]) -> Iterator[Result]:
        """Raises WorkerError where workers die on the same spec again and again, and whatever `fn` raises."""
        waiting = iter(specs)
        again: deque[tuple[Spec, int]] = deque()
        running: dict[Future[Result], tuple[Spec, int]] = {}
        while True:
            # One spec more than there are workers, so that none waits for the next; no more, for specs can hold data.
            while len(running) <= self.capacity:
                if again:
                    spec, tries = again.popleft()
                else:
                    try:
                        spec, tries = next(waiting), 0
                    except StopIteration:
                        break
                running[self._pool.submit(fn, spec)] = (spec, tries)
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            broken = False
            for future in done:
                spec, tries = running.pop(future)
                try:
                    yield future.result()
                except BrokenProcessPool:
                    broken = True
                    again.append(self._once_more(spec, tries))
            if broken:
                # A broken pool fails every future in it, the innocent with the guilty.
                again.extend(self._once_more(spec, tries) for spec, tries in running.values())
                running.clear()
                self._pool.shutdown(wait=False, cancel_futures=True)
                self._pool = self._fresh_pool()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _once_more(self, spec: Spec, tries: int) -> tuple[Spec, int]:
        if tries + 1 >= _TRIES:
            raise WorkerError(
                f"worker processes died {_TRIES} times; the last piece of work was {spec!r:.300}",
                remedy="look for an out-of-memory kill (dmesg); run with fewer --workers, or --workers 1 to see the error",
            )
        return spec, tries + 1

    def _fresh_pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self.capacity, mp_context=get_context("spawn"), initializer=_live_with_parent)


def _live_with_parent() -> None:
    """Make this worker end when the build does, even by SIGKILL, and leave Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()


def _end_after(sentinel: int) -> None:
    # A worker waits on a pipe that its siblings hold open too, so it would never see that nobody writes to it any more.
    connection.wait([sentinel])
    os._exit(1)
