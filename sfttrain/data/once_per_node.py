"""Work of one process of each machine for all processes of the machine.

The other processes wait at the file system. They do not wait in a collective operation, which would
time out during a long preparation.
"""

from __future__ import annotations

import atexit
import pickle
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sftprep.errors import SftprepError, WorkerError
from sftprep.shards import hold_lock

Result = TypeVar("Result")

_POLL_SECONDS = 0.1
_LOCK = "working"


@dataclass(frozen=True)
class Ranks:
    """Identity of this process among the processes of a run."""

    rank: int = 0
    """The 0-based index among all processes."""
    local: int = 0
    """The 0-based index among the processes of this machine."""
    world: int = 1
    """Number of all processes."""

    @property
    def is_leader(self) -> bool:
        """Whether this process does the work for its machine."""
        return self.local == 0


class OncePerMachine:
    """A runner of work in the first process of each machine.

    The other processes of the machine get its result or its error.

    1. Before the first work, all processes meet in one collective operation, in which the leaders
       publish the path of a folder. No process is late for it, because no work has begun.
    2. The leader writes each result to a file in its folder, and the others poll for this file.
    3. The leader holds a lock in the folder. If the lock is free and the result is missing, the
       leader has died, and the others raise an error and do not wait for ever.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._number = 0  # of the latest call of `do`, which names the file of its result
        # By rank: the folder of a leader, or ""; empty before the first work.
        self._folders: list[str] = []
        # Holds the lock of a leader until the process ends.
        self._lock = ExitStack()

    def do(self, work: Callable[[], Result]) -> Result:
        """Run `work` in the leader only, and return its result in every process.

        Every process must call this method, in the same order. An exception of `work` is raised in
        all processes of the machine.
        """
        if self._ranks.world == 1:
            return work()
        self._exchange_folders()
        self._number += 1
        path = self._folder / f"result-{self._number}"
        if self._ranks.is_leader:
            return self._run_as_leader(work, path)
        result: Result = self._wait_for_leader(path)
        return result

    def count_machines(self) -> int:
        """Return the number of machines, or 1 if they have different numbers of processes.

        Every process must call this method, in the same order as `do`.
        """
        world = self._ranks.world
        if world == 1:
            return 1
        self._exchange_folders()
        leaders = [rank for rank, folder in enumerate(self._folders) if folder]
        is_even = leaders == [*range(0, world, world // max(1, len(leaders)))]
        return len(leaders) if is_even and world % len(leaders) == 0 else 1

    def _exchange_folders(self) -> None:
        """Learn the folders of all leaders, once; a leader creates and locks its folder."""
        from accelerate.utils import gather_object

        if self._folders:
            return
        folder = ""
        if self._ranks.is_leader:
            folder = tempfile.mkdtemp(prefix="sfttrain-")
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            path = Path(folder) / _LOCK
            self._lock.enter_context(hold_lock(path.open("wb"), path))
        self._folders = gather_object([folder])

    @property
    def _folder(self) -> Path:
        """The folder of this machine's leader."""
        # The ranks of a machine are consecutive, and its leader has the lowest.
        return Path(self._folders[self._ranks.rank - self._ranks.local])

    def _run_as_leader(self, work: Callable[[], Result], path: Path) -> Result:
        try:
            result = work()
        except SftprepError as error:
            _write_pickle(path, error)
            raise
        except BaseException as error:
            # Other exceptions are described, because it is not certain that they can be pickled.
            _write_pickle(
                path,
                WorkerError(
                    f"the process that prepares the data failed: {error!r:.500}",
                    remedy="see the error message of that process",
                ),
            )
            raise
        _write_pickle(path, result)
        return result

    def _wait_for_leader(self, path: Path) -> Any:
        while not path.exists():
            # The leader may write the result and end between the two looks at the path.
            if self._has_leader_ended() and not path.exists():
                raise WorkerError(
                    "the process that prepares the data for this machine has ended",
                    remedy="see the error message of that process, further up",
                )
            time.sleep(_POLL_SECONDS)
        result: Any = pickle.loads(path.read_bytes())
        if isinstance(result, BaseException):
            raise result
        return result

    def _has_leader_ended(self) -> bool:
        try:
            path = self._folder / _LOCK
            with hold_lock(path.open("rb"), path, shared=True):
                return True
        except BlockingIOError:
            return False
        except OSError:  # the leader removes the folder when it ends
            return True


def _write_pickle(path: Path, value: Any) -> None:
    """Write a value; the file appears under its name when it is complete."""
    temporary = path.with_suffix(".half")
    temporary.write_bytes(pickle.dumps(value))
    temporary.rename(path)
