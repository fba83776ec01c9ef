"""Who runs the passes: this process, or worker processes. The output is the same bytes either
way."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from itertools import islice
from multiprocessing import connection, get_context, parent_process
from typing import Generic, Protocol, TypeVar

from sftprep.core.subprocesses import isolated_spawn
from sftprep.errors import WorkerError

Spec = TypeVar("Spec")
Result = TypeVar("Result")

_TRIES = 3

_log = logging.getLogger(__name__)


class Executor(Protocol):
    """Runs a function over specs, in any order; functions and specs must be such that a second run
    does no harm."""

    @property
    def capacity(self) -> int:
        """How many specs run at the same time."""

    def map_unordered(
        self, fn: Callable[[Spec], Result], specs: Iterable[Spec]
    ) -> Iterator[Result]:
        """Results as they come; specs are taken from the iterable only as there is room for
        them."""

    def close(self) -> None:
        """Stop the workers; what still runs is abandoned."""


def make_executor(workers: int, first: Callable[[], None] | None = None) -> Executor:
    """This process for one worker; for more, this process and a pool of all others. first: what
    those are to do first."""
    return InProcess() if workers <= 1 else Processes(workers - 1, with_this_one=True, first=first)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class InProcess:
    """One spec after the other, here."""

    capacity = 1

    def map_unordered(
        self, fn: Callable[[Spec], Result], specs: Iterable[Spec]
    ) -> Iterator[Result]:
        return map(fn, specs)

    def close(self) -> None:
        return None


class Processes:
    """A pool of spawned processes. A spec whose worker died is tried again in a fresh pool, three
    times in all.

    with_this_one: this process works too, from the start, while the others take a second to load;
    one that has loaded gets specs. first: loads in the others what their specs will need; where it
    fails, those will say why.
    """

    def __init__(
        self,
        processes: int,
        *,
        with_this_one: bool = False,
        first: Callable[[], None] | None = None,
    ) -> None:
        self.capacity = processes + with_this_one
        self._processes, self._with_this_one = processes, with_this_one
        self._pool = self._fresh_pool()
        self._told = False
        self._loading: Future[None] | None = None
        if with_this_one:
            with isolated_spawn():
                self._loading = self._pool.submit(_loaded, first)
                # One for each process; as soon as one of them is ready, there are specs for it.
                for _ in range(processes - 1):
                    self._pool.submit(_loaded, first)

    def map_unordered(
        self, fn: Callable[[Spec], Result], specs: Iterable[Spec]
    ) -> Iterator[Result]:
        """Raises WorkerError where workers die on the same spec again and again, and whatever `fn`
        raises."""
        waiting = _Ahead((spec, 0) for spec in specs)
        again: deque[tuple[Spec, int]] = deque()
        running: dict[Future[Result], tuple[Spec, int]] = {}
        while True:
            # One spec more than there are workers, so that none waits for the next; no more, for
            # specs can hold data.
            while len(running) <= self._processes and self._has_loaded():
                if self._with_this_one and len(running) == self._processes and not waiting.has(2):
                    break  # the last one is for this process, which would have nothing to do
                taken = again.popleft() if again else waiting.take()
                if taken is None:
                    break
                try:
                    with isolated_spawn():
                        running[self._pool.submit(fn, taken[0])] = taken
                except BrokenProcessPool:
                    again.append(self._once_more(*taken))
                    self._replace_pool()
            own = waiting.take() if self._with_this_one else None
            if own is not None:
                yield fn(own[0])
            elif not running and not again:
                return
            # While there is work for this process, it does not wait for the others.
            done, _ = wait(running, timeout=None if own is None else 0, return_when=FIRST_COMPLETED)
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
                again.extend(self._once_more(*taken) for taken in running.values())
                running.clear()
                self._replace_pool()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _has_loaded(self) -> bool:
        """Whether the pool takes work. One that cannot even load never does."""
        if self._loading is None:
            return True
        if not self._loading.done():
            return False
        if self._loading.exception() is None:
            self._loading = None
            return True
        if not self._told:
            self._told = True
            _log.warning(
                "worker processes cannot be started (%s); this one does all the work",
                self._loading.exception(),
            )
        return False

    def _once_more(self, spec: Spec, tries: int) -> tuple[Spec, int]:
        if tries + 1 >= _TRIES:
            raise WorkerError(
                f"worker processes died {_TRIES} times; the last piece of work was {spec!r:.300}",
                remedy=(
                    "look for an out-of-memory kill (dmesg); run with fewer --workers, or --workers"
                    " 1 to see the error"
                ),
            )
        return spec, tries + 1

    def _replace_pool(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool = self._fresh_pool()

    def _fresh_pool(self) -> ProcessPoolExecutor:
        with isolated_spawn():  # the queues of the pool may start a process too
            return ProcessPoolExecutor(
                self._processes, mp_context=get_context("spawn"), initializer=_live_with_parent
            )


class _Ahead(Generic[Spec]):
    """Items of an iterator, which can be asked whether it has so many left."""

    def __init__(self, items: Iterable[Spec]) -> None:
        self._items = iter(items)
        self._taken: deque[Spec] = deque()

    def has(self, count: int) -> bool:
        self._taken.extend(islice(self._items, max(0, count - len(self._taken))))
        return len(self._taken) >= count

    def take(self) -> Spec | None:
        return self._taken.popleft() if self.has(1) else None


def _loaded(first: Callable[[], None] | None) -> None:
    """What a worker runs first: it has this module, and so whatever the passes import, and what
    they load."""

    if first is not None:
        with suppress(Exception):
            first()


def _live_with_parent() -> None:
    """Make this worker end when the build does, even by SIGKILL, and leave Ctrl-C and stdout to
    it."""
    sys.stdout = (
        sys.stderr
    )  # functions of the user may print, and the build's own stdout may be read as JSON
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()


def _end_after(sentinel: int) -> None:
    # A worker waits on a pipe that its siblings hold open too, so it would never see that nobody
    # writes to it any more.
    connection.wait([sentinel])
    os._exit(1)
