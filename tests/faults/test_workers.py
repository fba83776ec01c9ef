"""Workers that are killed, and workers of a build that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from sftprep.errors import WorkerError
from sftprep.pipeline.executors.local import InProcess, Processes

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def double(number: int) -> int:
    return 2 * number


def die_once(marker: str) -> str:
    """Kill the current process at the first call."""
    path = Path(marker)
    if not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return marker


def die(_: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def has_ended(worker: BaseProcess) -> bool:
    """Wait up to ten seconds for the end of a process.

    A thread of the pool waits for it too, and takes its exit code, so `is_alive` may be wrong.
    """
    return bool(connection.wait([worker.sentinel], 10))


def fail(number: int) -> int:
    raise ValueError(number)


@pytest.fixture(params=["two others", "this one and another"])
def any_pool(request):
    executor = (
        Processes(2) if request.param == "two others" else Processes(1, include_this_process=True)
    )
    yield executor
    executor.close()


@pytest.fixture
def pool():
    executor = Processes(2)
    yield executor
    executor.close()


def test_executors_give_the_same_results(any_pool):
    assert sorted(any_pool.map_unordered(double, iter(range(20)))) == sorted(
        InProcess().map_unordered(double, range(20))
    )
    assert list(any_pool.map_unordered(double, [])) == []


def test_specs_are_taken_only_when_a_worker_can_run_them(any_pool):
    taken = []

    def specs():
        for number in range(50):
            taken.append(number)
            yield number

    results = any_pool.map_unordered(double, specs())
    next(results)
    assert len(taken) < 10
    assert len(list(results)) == 49


def test_a_worker_that_is_killed_is_replaced_and_its_work_done(pool, tmp_path):
    specs = [str(tmp_path / f"{k}") for k in range(4)]
    for spec in specs[1:]:
        Path(spec).touch()
    assert sorted(pool.map_unordered(die_once, specs)) == specs


def die_elsewhere_once(spec: tuple[int, str]) -> int:
    """Return the process id after a pause; the first call in another process kills that process."""
    first, marker = spec
    time.sleep(0.05)
    if os.getpid() != first and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()


def test_this_process_works_too_and_another_that_is_killed_is_replaced(tmp_path):
    executor = Processes(1, include_this_process=True)
    try:
        marker = tmp_path / "killed"
        where = list(executor.map_unordered(die_elsewhere_once, [(os.getpid(), str(marker))] * 60))
    finally:
        executor.close()
    assert len(where) == 60
    assert marker.exists()
    assert len(set(where)) == 2


def process_of(_: int) -> int:
    time.sleep(0.05)
    return os.getpid()


def test_a_script_without_a_guard_is_not_run_again_by_workers(tmp_path):
    script = tmp_path / "unguarded.py"
    script.write_text(
        "print('started', flush=True)\n"
        "from sftprep.pipeline.executors.local import Processes\n"
        "from tests.faults.test_workers import process_of\n"
        "executor = Processes(1, include_this_process=True)\n"
        "print(len(set(executor.map_unordered(process_of, range(60)))))\n"
        "executor.close()\n"
    )
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.split() == ["started", "2"]
    assert done.stderr == ""


def test_this_process_does_all_of_the_work_if_workers_cannot_load(monkeypatch, caplog):
    monkeypatch.setattr("sftprep.pipeline.executors.local._load_worker", die_loading)
    executor = Processes(1, include_this_process=True)
    try:
        while not executor._loading.done():
            time.sleep(0.05)
        assert sorted(executor.map_unordered(double, range(5))) == [0, 2, 4, 6, 8]
    finally:
        executor.close()
    assert "a worker process ended while it started" in caplog.text
    assert "this process does all of the work" in caplog.text


def test_workers_that_do_not_end_are_killed_when_the_pool_is_closed(monkeypatch):
    monkeypatch.setattr("sftprep.pipeline.executors.local._SECONDS_TO_END", 0.2)
    executor = Processes(2)
    assert len(list(executor.map_unordered(double, range(4)))) == 4
    workers = list(executor._pool._processes.values())
    os.kill(workers[0].pid, signal.SIGSTOP)
    executor.close()
    assert all(has_ended(worker) for worker in workers)


def test_a_stopped_worker_does_not_outlive_a_pool_that_is_replaced(monkeypatch):
    monkeypatch.setattr("sftprep.pipeline.executors.local._SECONDS_TO_END", 0.2)
    executor = Processes(2)
    list(executor.map_unordered(double, range(4)))
    workers = list(executor._pool._processes.values())
    os.kill(workers[0].pid, signal.SIGSTOP)
    os.kill(workers[1].pid, signal.SIGKILL)
    try:
        assert list(executor.map_unordered(double, [1])) == [2]
    finally:
        executor.close()
    assert has_ended(workers[0])


def test_a_limit_on_open_files_is_a_typed_error(tokenizer_dir, tmp_path):
    code = (
        "import os, resource, sys\n"
        "from sftprep import build\n"
        "from sftprep.errors import SftprepError\n"
        "folder = sys.argv[1]\n"
        "open(f'{folder}/a.jsonl', 'w').write('{\"text\": \"a b c\"}\\n' * 9)\n"
        "def run(name):\n"
        "    settings = dict(tokenizer=sys.argv[2], max_length=64, workers=1)\n"
        "    build(f'{folder}/a.jsonl', output=f'{folder}/{name}', **settings)\n"
        "run('warm')\n"
        "used = len(os.listdir('/proc/self/fd'))\n"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "for more in range(4):\n"
        "    resource.setrlimit(resource.RLIMIT_NOFILE, (used + more, hard))\n"
        "    try: run(f'out{more}')\n"
        "    except SftprepError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(tokenizer_dir)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "ulimit -n" in done.stdout


def die_loading(_: object) -> None:
    os._exit(1)


def test_work_that_kills_every_worker_ends_with_an_error(pool):
    with pytest.raises(WorkerError, match="died 3 times"):
        list(pool.map_unordered(die, [1]))


def test_an_exception_in_a_worker_is_raised_in_the_driver(pool):
    with pytest.raises(ValueError, match="7"):
        list(pool.map_unordered(fail, [7]))


@linux
def test_workers_end_with_a_build_that_is_killed():
    code = (
        "import time; from sftprep.pipeline.executors.local import Processes; from"
        " tests.faults.test_workers import double\npool = Processes(2);"
        " list(pool.map_unordered(double, range(8))); print('ready', flush=True); time.sleep(60)"
    )
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True
    ) as build:
        assert build.stdout is not None
        assert build.stdout.readline() == "ready\n"
        workers = children(build.pid)
        assert len(workers) >= 2
        build.kill()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "workers outlive their build"
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        if parent == pid:
            found.append(int(status.parent.name))
    return found
