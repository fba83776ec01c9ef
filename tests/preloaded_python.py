"""Python processes that start with the libraries of sfttrain loaded.

A new interpreter takes six seconds of a core to import torch, transformers and peft. A fork server
of `multiprocessing` imports them once per test session and forks a process for each call, which
then runs a module, code or a script as a new interpreter would. Tests of the start itself (search
paths, launchers, imports) need a new interpreter: use `subprocess`. So do tests with a GPU: CUDA
cannot be used after a fork, so that these processes see no GPU.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import resource
import runpy
import socket
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from tempfile import TemporaryDirectory
from time import monotonic
from unittest.mock import patch

from sftprep.core.subprocesses import isolated_spawn, module_environment

ROOT = Path(__file__).resolve().parents[1]
_NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
_PRELOADED = [
    "sfttrain.cli.run",
    "sfttrain.cli.arguments",
    "tests.sfttrain.trainer_factory",
    "tests.frozen_imports",
]


def run_python(
    *arguments: str,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    timeout: float = 120,
    file_size_limit: int | None = None,
) -> CompletedProcess[str]:
    """Run `python *arguments` in a forked process, like `subprocess.run` with captured output.

    Args:
        arguments: Optionally `-P`; `-m` and a module, `-c` and code, or a script; its arguments.
        cwd: The working directory, which is searched for modules unless `-P` is specified.
        env: The environment; by default that of this process.
        timeout: The seconds after which the process is killed and TimeoutExpired is raised.
        file_size_limit: The largest file that the process may write, in bytes (RLIMIT_FSIZE).
    """
    environment = dict(os.environ if env is None else env)
    return _run([environment], arguments, cwd, timeout, file_size_limit)


def run_ranks(
    ranks: int,
    *arguments: str,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    timeout: float = 120,
) -> CompletedProcess[str]:
    """Run `python *arguments` in several processes with the environment that torchrun sets.

    Returns:
        The output of all ranks together, and the first exit code that is not zero.
    """
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    shared = dict(os.environ if env is None else env) | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
    }
    environments = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return _run(environments, arguments, cwd, timeout, None)


@functools.cache
def _fork_server() -> ForkServerContext:
    """Return a context whose server is configured; it starts with the first process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _run(
    environments: Sequence[dict[str, str]],
    arguments: Sequence[str],
    cwd: Path,
    timeout: float,
    file_size_limit: int | None,
) -> CompletedProcess[str]:
    """Run one process per environment, with common files for their output."""
    context = _fork_server()
    with TemporaryDirectory() as folder:
        outputs = [str(Path(folder, name)) for name in ("stdout", "stderr")]
        processes = [
            context.Process(
                target=_become_interpreter,
                args=(arguments, str(cwd), environment, outputs, file_size_limit),
            )
            for environment in environments
        ]
        # The server loads the libraries with one thread, and its children inherit that.
        server_environment = {**module_environment(), **_NO_GPU, "OMP_NUM_THREADS": "1"}
        for process in processes:
            with patch.dict(os.environ, server_environment), isolated_spawn():
                process.start()
        is_in_time = _wait_for(processes, timeout)
        printed = [Path(name).read_text(encoding="utf-8") for name in outputs]
    if not is_in_time:
        raise TimeoutExpired([*arguments], timeout, *printed)
    codes = [process.exitcode or 0 for process in processes]
    return CompletedProcess([*arguments], next(filter(None, codes), 0), *printed)


def _wait_for(processes: Sequence[ForkServerProcess], timeout: float) -> bool:
    """Wait until all processes exit; kill the others if one fails, or when the time is over."""
    deadline = monotonic() + timeout
    running = {process.sentinel: process for process in processes}
    is_in_time = True
    while running:
        done = wait(list(running), max(0.0, deadline - monotonic()))
        is_in_time = is_in_time and bool(done)
        for sentinel in set(running).intersection(done):
            running.pop(sentinel).join()
        if not done or any(process.exitcode for process in processes):
            for process in running.values():
                process.kill()
    return is_in_time


def _become_interpreter(
    arguments: Sequence[str],
    cwd: str,
    environment: dict[str, str],
    outputs: Sequence[str],
    file_size_limit: int | None,
) -> None:
    """Do in a forked process what a new interpreter does with these arguments."""
    # 1. The state of the process: output, environment, working directory, limits.
    for descriptor, name in enumerate(outputs, start=1):
        opened = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment | _NO_GPU)
    os.chdir(cwd)
    if file_size_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size_limit, file_size_limit))
    # 2. The program, with the folder that is searched for modules first.
    is_safe_path = arguments[0] == "-P"
    first, *rest = arguments[1:] if is_safe_path else arguments
    if not is_safe_path:
        sys.path.insert(0, cwd if first in ("-m", "-c") else str(Path(first).parent))
    if first == "-m":
        module, *rest = rest
        sys.argv = [module, *rest]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    elif first == "-c":
        code, *rest = rest
        sys.argv = ["-c", *rest]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")
