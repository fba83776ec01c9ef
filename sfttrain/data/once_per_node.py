"""Work that one process of each machine does, while the others wait at the file system and not in a
collective that times out."""

from __future__ import annotations

import atexit
import fcntl
import pickle
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sftprep.errors import SftprepError, WorkerError

Result = TypeVar("Result")

_POLL_SECONDS = 0.1
_LOCK = "working"


@dataclass(frozen=True)
class Ranks:
    """Which process this is: of `world` in all, and of those on its machine the `local`-th (from
    0)."""

    rank: int = 0
    local: int = 0
    world: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process does the work for its machine."""
        return self.local == 0


class OncePerMachine:
    """Runs work in the first process of each machine and hands its result, or its error, to the
    others.

    The processes meet once, before the first work begins, to learn of a folder of their leader's;
    that is a collective, but nobody is late for it. From then on they look into that folder. The
    leader holds a lock in it: when it is free and no result is there, the leader has died, and the
    others say so instead of waiting for ever.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._number = ranks, 0
        self._folder: Path | None = None

    def do(self, work: Callable[[], Result]) -> Result:
        """What `work` returns in the leader. Every process must call this, in the same order.
        Raises what `work` raises there."""
        if self._ranks.world == 1:
            return work()
        if self._folder is None:
            self._folder = self._met()
        self._number += 1
        place = self._folder / f"result-{self._number}"
        if self._ranks.leads:
            return self._lead(work, place)
        result: Result = self._follow(place)
        return result

    def _met(self) -> Path:
        from accelerate.utils import gather_object

        own = ""
        if self._ranks.leads:
            own = tempfile.mkdtemp(prefix="sfttrain-")
            atexit.register(shutil.rmtree, own, ignore_errors=True)
            self._lock: Any = (Path(own) / _LOCK).open("wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        folders: list[str] = gather_object([own])
        return Path(folders[self._ranks.rank - self._ranks.local])

    def _lead(self, work: Callable[[], Result], place: Path) -> Result:
        try:
            result = work()
        except SftprepError as error:
            _write(place, error)
            raise
        except BaseException as error:
            _write(
                place,
                WorkerError(
                    f"the process that prepares the data failed: {error!r:.500}",
                    remedy="see its own message",
                ),
            )
            raise
        _write(place, result)
        return result

    def _follow(self, place: Path) -> Any:
        while not place.exists():
            if self._leader_is_gone() and not place.exists():
                raise WorkerError(
                    "the process that prepares the data for this machine has ended",
                    remedy="see its own message, further up",
                )
            time.sleep(_POLL_SECONDS)
        found: Any = pickle.loads(place.read_bytes())
        if isinstance(found, BaseException):
            raise found
        return found

    def _leader_is_gone(self) -> bool:
        assert self._folder is not None
        try:
            with (self._folder / _LOCK).open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # the folder is removed when the leader ends
            return True
        return True


def _write(place: Path, value: Any) -> None:
    half = place.with_suffix(".half")
    half.write_bytes(pickle.dumps(value))
    half.rename(place)
