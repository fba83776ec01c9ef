"""Locks of output folders: by `flock`, and by leases where there is none."""

from __future__ import annotations

import errno
import fcntl
import getpass
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from sftprep.core import file_locks
from sftprep.core.file_locks import hold_lock, lease_path
from sftprep.errors import OutputBusy, OutputExists
from sftprep.shards.locks import exclusive, shared
from sftprep.shards.ownership import is_work_file

_HOLDER = """
import sys
from pathlib import Path
from sftprep.core import file_locks
from sftprep.shards.locks import exclusive
if sys.argv[2] == "lease":
    file_locks.fcntl = None
with exclusive(Path(sys.argv[1]), "another build", Path("out"), remedy="wait"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(params=["flock", "lease"])
def kind(request, monkeypatch) -> str:
    """Use each kind of lock; a missing `fcntl` is what Windows has."""
    if request.param == "lease":
        monkeypatch.setattr(file_locks, "fcntl", None)
    return request.param


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    return tmp_path / "lock"


@contextmanager
def held_by_process(lock: Path, kind: str) -> Iterator[subprocess.Popen[str]]:
    """Hold a lock in another process, which is killed at the end."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, lock, kind], text=True, **pipes
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        try:
            yield holder
        finally:
            holder.kill()


def take(lock: Path, mode: Callable[..., contextmanager[None]] = exclusive) -> contextmanager[None]:
    return mode(lock, "another build", lock.parent, remedy="wait")


def test_the_error_names_who_holds_the_lock_and_a_killed_holder_is_replaced_at_once(lock, kind):
    with held_by_process(lock, kind) as holder:
        for mode in (exclusive, shared):
            with pytest.raises(OutputBusy) as caught, take(lock, mode):
                pass
            user, host = getpass.getuser(), platform.node()
            who = f"(process {holder.pid} of {user} on {host}, since 2"
            assert who in caught.value.message
            assert ("remove" in str(caught.value.remedy)) == (kind == "lease")
        holder.kill()
        holder.wait()
        with take(lock):
            assert is_work_file(lock.parent, "lock")
            assert lease_path(lock).exists() == (kind == "lease")
            assert kind == "flock" or is_work_file(lock.parent, "lock.lease")
    assert os.listdir(lock.parent) == []


def test_a_suspended_holder_keeps_its_lock(lock, kind):
    """Another build would overlap with it when it continues."""
    with held_by_process(lock, kind) as holder:
        os.kill(holder.pid, signal.SIGSTOP)
        for _ in range(3):
            with pytest.raises(OutputBusy), take(lock):
                pass


def test_several_processes_share_a_lock(lock, kind):
    with take(lock, shared), take(lock, shared), ExitStack() as stack:
        if kind == "flock":
            stack.enter_context(pytest.raises(OutputBusy))
        # A lease cannot be shared, so it does not exclude a build on such a file system.
        stack.enter_context(take(lock))


def test_a_file_of_a_user_is_not_a_lock(lock, kind):
    lock.write_text("thesis")
    with pytest.raises(OutputExists, match="it has other content"), take(lock):
        pass
    assert lock.read_text() == "thesis"
    assert os.listdir(lock.parent) == ["lock"]


def test_a_lease_of_another_machine_is_not_replaced(lock, monkeypatch):
    monkeypatch.setattr(file_locks, "fcntl", None)
    record = "filelock/2\npid=1\nhost=elsewhere\nmode=lease\ntoken=ab\nduration=30.0\n"
    lease_path(lock).write_text(record)
    with pytest.raises(OutputBusy) as caught, take(lock):
        pass
    assert f"remove {lease_path(lock)}" in str(caught.value.remedy)
    assert lease_path(lock).read_text() == record
    lease_path(lock).unlink()
    with take(lock):
        pass


def test_a_file_system_without_flock_gets_leases(lock, monkeypatch):
    def refuse(_file, _kind):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with take(lock):
        assert lease_path(lock).exists()
        with pytest.raises(OutputBusy), take(lock):
            pass
    assert not lease_path(lock).exists()


def test_a_waiting_process_gets_the_lock_when_its_holder_ends(lock, kind):
    with held_by_process(lock, kind) as holder:
        holder.stdin.close()
        with hold_lock(lock.open("ab"), lock, wait=True):
            pass
