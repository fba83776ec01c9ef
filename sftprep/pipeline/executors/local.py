"""Executors on this machine: this process, or a pool of worker processes."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from itertools import islice
from multiprocessing import connection, get_context, parent_process
from typing import Generic

from sftprep.core.subprocesses import isolated_spawn
from sftprep.errors import WorkerError, setting
from sftprep.pipeline.executors.base import Executor, Result, Spec

_MOST_ATTEMPTS = 3
_SECONDS_TO_END = 5.0
"""The time that workers have to end by themselves when their pool is stopped."""

_log = logging.getLogger(__name__)


def make_executor(workers: int, initializer: Callable[[], None] | None = None) -> Executor:
    """Return an executor for this process and `workers - 1` others.

    Args:
        workers: The number of processes, this one included.
        initializer: A function that each other process runs when it starts.
    """
    if workers <= 1:
        return InProcess()
    return Processes(workers - 1, include_this_process=True, initializer=initializer)


def available_cores() -> int:
    """Return the number of cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class InProcess:
    """An executor in this process, for one spec after the other."""

    capacity = 1
    far = False

    def map_unordered(
        self, fn: Callable[[Spec], Result], specs: Iterable[Spec]
    ) -> Iterator[Result]:
        return map(fn, specs)

    def close(self) -> None:
        return None


class Processes:
    """An executor with a pool of spawned processes.

    A spec whose worker died is run again in a new pool, at most three times in all.

    Args:
        processes: The number of spawned processes.
        include_this_process: Whether this process runs specs too. It starts immediately, whereas
            the others take about a second to load, and get specs as soon as one of them is ready.
        initializer: A function that each spawned process runs first, to load what its specs need.
            An exception in it is ignored: the specs fail for the same reason, with a better error.
    """

    far = False

    def __init__(
        self,
        processes: int,
        *,
        include_this_process: bool = False,
        initializer: Callable[[], None] | None = None,
    ) -> None:
        self.capacity = processes + include_this_process
        self._processes = processes
        self._include_this_process = include_this_process
        self._pool = self._make_pool()
        self._has_warned = False  # that the pool cannot be started
        # Done when the first worker has loaded; None when that is known, or is not waited for.
        self._loading: Future[None] | None = None
        if include_this_process:
            with isolated_spawn():
                self._loading = self._pool.submit(_load_worker, initializer)
                # One call for each worker, so that all of them load at the same time.
                for _ in range(processes - 1):
                    self._pool.submit(_load_worker, initializer)

    def map_unordered(
        self, fn: Callable[[Spec], Result], specs: Iterable[Spec]
    ) -> Iterator[Result]:
        """Yield results as soon as they are ready, in any order.

        Raises:
            WorkerError: Workers died repeatedly while they ran the same spec.
            Exception: Any exception that `fn` raises.
        """
        waiting = _LookaheadQueue((spec, 0) for spec in specs)  # a spec and its failed attempts
        retries: deque[tuple[Spec, int]] = deque()
        running: dict[Future[Result], tuple[Spec, int]] = {}
        while True:
            # 1. Hand specs to the pool: one more than there are workers, so that no worker is idle
            # between two specs, and not more, because specs may hold data.
            while len(running) <= self._processes and self._has_loaded():
                is_pool_busy = len(running) == self._processes
                if self._include_this_process and is_pool_busy and not waiting.has(2):
                    break  # the last spec is for this process, which would be idle otherwise
                item = retries.popleft() if retries else waiting.take()
                if item is None:
                    break
                try:
                    with isolated_spawn():
                        running[self._pool.submit(fn, item[0])] = item
                except BrokenProcessPool:
                    retries.append(self._count_attempt(*item))
                    self._replace_pool()
            # 2. Run one spec here. Specs that are run again stay with the pool: they may be the
            # reason why a worker died.
            local_item = waiting.take() if self._include_this_process else None
            if local_item is not None:
                yield fn(local_item[0])
            elif not running and not retries:
                return
            # 3. Collect results. While there are specs for this process, it does not wait.
            timeout = None if local_item is None else 0
            done, _ = wait(running, timeout=timeout, return_when=FIRST_COMPLETED)
            is_broken = False
            for future in done:
                spec, attempts = running.pop(future)
                try:
                    yield future.result()
                except BrokenProcessPool:
                    is_broken = True
                    retries.append(self._count_attempt(spec, attempts))
            if is_broken:
                # The death of one worker fails every future of the pool, and nothing tells which
                # spec was the reason.
                retries.extend(self._count_attempt(*item) for item in running.values())
                running.clear()
                self._replace_pool()

    def close(self) -> None:
        """Stop the pool, and kill workers still running after some seconds.

        For example, SIGSTOP may have stopped them. At its exit, Python would wait for them forever.
        """
        workers = list((self._pool._processes or {}).values())
        self._pool.shutdown(wait=False, cancel_futures=True)
        deadline = time.monotonic() + _SECONDS_TO_END
        while running := [
            worker for worker in workers if not connection.wait([worker.sentinel], 0)
        ]:
            seconds = deadline - time.monotonic()
            if seconds <= 0:
                break
            connection.wait([worker.sentinel for worker in running], seconds)
        for worker in running:
            worker.kill()

    def _has_loaded(self) -> bool:
        """Return whether the pool accepts specs.

        It never does if its workers cannot be started.
        """
        if self._loading is None:
            return True
        if not self._loading.done():
            return False
        if self._loading.exception() is None:
            self._loading = None
            return True
        if not self._has_warned:
            self._has_warned = True
            error = self._loading.exception()
            _log.warning(
                "%s; this process does all of the work",
                "a worker process ended while it started (killed, perhaps for lack of memory)"
                if isinstance(error, BrokenProcessPool)
                else f"worker processes cannot be started ({error})",
            )
        return False

    def _count_attempt(self, spec: Spec, attempts: int) -> tuple[Spec, int]:
        """Add a failed attempt to a spec; raise WorkerError after the last one."""
        if attempts + 1 >= _MOST_ATTEMPTS:
            raise WorkerError(
                f"worker processes died {_MOST_ATTEMPTS} times; the last task was {spec!r:.300}",
                remedy=[
                    "check the system log for an out-of-memory kill (dmesg)",
                    f"use fewer {setting('workers')}",
                    f"use {setting('workers', 1)} to see the error",
                ],
            )
        return spec, attempts + 1

    def _replace_pool(self) -> None:
        self.close()
        self._pool = self._make_pool()

    def _make_pool(self) -> ProcessPoolExecutor:
        with isolated_spawn():  # the queues of the pool may start a process too
            return ProcessPoolExecutor(
                self._processes, mp_context=get_context("spawn"), initializer=_bind_to_parent
            )


class _LookaheadQueue(Generic[Spec]):
    """The items of an iterator, with a test whether N of them are left."""

    def __init__(self, items: Iterable[Spec]) -> None:
        self._items = iter(items)
        self._buffer: deque[Spec] = deque()  # items taken from the iterator and not yet returned

    def has(self, count: int) -> bool:
        self._buffer.extend(islice(self._items, max(0, count - len(self._buffer))))
        return len(self._buffer) >= count

    def take(self) -> Spec | None:
        return self._buffer.popleft() if self.has(1) else None


def _load_worker(initializer: Callable[[], None] | None) -> None:
    """Run the initializer in a worker.

    Unpickling this call already imports the modules of the passes.
    """
    if initializer is not None:
        with suppress(Exception):
            initializer()


def _bind_to_parent() -> None:
    """Make a worker end with its parent, even after SIGKILL.

    Ctrl-C and stdout are left to the parent.
    """
    # User-provided functions may print, and the stdout of the build may be parsed as JSON.
    sys.stdout = sys.stderr
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=_exit_after_parent, args=(parent.sentinel,), daemon=True).start()


def _exit_after_parent(sentinel: int) -> None:
    # The pipe on which a worker waits for specs is also held open by the other workers, so the
    # worker would never see the end of it after the parent died.
    connection.wait([sentinel])
    os._exit(1)
