"""The tasks of a build, and the executor that runs them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sftprep.config.build import BuildConfig
from sftprep.core.atomic_write import write_bytes
from sftprep.pipeline.executors.base import Executor
from sftprep.pipeline.executors.local import available_cores, make_executor
from sftprep.pipeline.executors.ray_tasks import RayExecutor
from sftprep.pipeline.groups.task import GroupTask
from sftprep.pipeline.groups.task_list import make_tasks
from sftprep.pipeline.passes.tokenize_pass import load_preprocessors
from sftprep.pipeline.prepare.setup import Setup
from sftprep.recipe import RecipeFile, recipe_file
from sftprep.tokenize.encoders.reference import HfEncoder
from sftprep.tokenize.equivalence.reference_client import ReferenceServer

_BYTES_PER_WORKER = 24 << 20
"""A spawned worker with less input than this spends longer on its imports than on its work."""


@dataclass(frozen=True, slots=True)
class Workers:
    """What runs a build.

    Attributes:
        tasks: The groups of the build.
        executor: The executor.
        count: The number of processes.
    """

    tasks: list[GroupTask]
    executor: Executor
    count: int


@contextmanager
def connect_executor(config: BuildConfig) -> Iterator[Executor | None]:
    """Connect to the executor on other machines that the settings name; None for this machine."""
    if config.output.executor == "local":
        yield None
        return
    executor = RayExecutor(config.output.ray_address)
    try:
        yield executor
    finally:
        executor.close()


@contextmanager
def start_workers(
    config: BuildConfig, setup: Setup, work: Path, executor: Executor | None
) -> Iterator[Workers]:
    """Start the workers of a build, and stop them at the end.

    Args:
        config: The settings of the build.
        setup: Its setup.
        work: The folder for the files before the commit.
        executor: The executor, which the caller closes; None to start one on this machine.
    """
    is_far = executor is not None and executor.far
    count = _count_workers(config, setup) if executor is None else executor.capacity
    with ExitStack() as stack:
        # Other machines do not reach a server of this one.
        servers = stack.enter_context(_start_servers(setup, 1 if is_far else count))
        recipes = _write_recipes(setup, work, servers, is_far or count > 1)
        tasks = make_tasks(setup, config, recipes, work, is_far=is_far)
        if executor is None:
            executor = make_executor(count, partial(load_preprocessors, recipes))
            stack.callback(executor.close)
        yield Workers(tasks, executor, count)


@contextmanager
def _start_servers(setup: Setup, workers: int) -> Iterator[list[ReferenceServer | None]]:
    """Start a server of the reference encoder for each recipe, where needed.

    Several workers share a server; a single worker starts its own when it needs one.
    """
    with ExitStack() as stack:
        servers: list[ReferenceServer | None] = []
        for recipe in setup.recipes:
            is_needed = workers > 1 and recipe.encoder != HfEncoder.name
            servers.append(ReferenceServer(recipe.tokenizer) if is_needed else None)
            if (server := servers[-1]) is not None:
                stack.callback(server.close)
        yield servers


def _write_recipes(
    setup: Setup, folder: Path, servers: Sequence[ReferenceServer | None], has_workers: bool
) -> list[RecipeFile]:
    """Write the recipes for the worker processes, if any; return their files for tasks."""
    files = [
        recipe_file(folder, recipe, server.address if server else None)
        for recipe, server in zip(setup.recipes, servers, strict=True)
    ]
    if has_workers:
        for file, recipe in zip(files, setup.recipes, strict=True):
            write_bytes(file.path, recipe.to_bytes())
    return files


def _count_workers(config: BuildConfig, setup: Setup) -> int:
    if config.output.workers is not None:
        return config.output.workers
    return min(available_cores(), max(1, input_bytes(setup) // _BYTES_PER_WORKER))


def input_bytes(setup: Setup) -> int:
    """Return the size of all input files."""
    return sum(each.stamp[0] for each in setup.inputs if each.stamp is not None)
