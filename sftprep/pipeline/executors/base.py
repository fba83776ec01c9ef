"""The interface of executors, and the check of their versions.

Any object with this interface can run a build (`sftprep.build(executor=...)`). All executors
produce the same bytes, because each task is a pure function of its spec and of files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable

from sftprep.config.passed_functions import PassedFunction
from sftprep.core.versions import version_of
from sftprep.errors import ConfigError, WorkerError, setting
from sftprep.recipe import Recipe
from sftprep.version import __version__

Spec = TypeVar("Spec")
Result = TypeVar("Result")


@runtime_checkable
class Executor(Protocol):
    """A function applied to specs, in any order.

    The function must be idempotent, because a spec whose worker died is run again.
    """

    @property
    def capacity(self) -> int:
        """The number of simultaneous specs."""

    @property
    def far(self) -> bool:
        """Whether specs run on other machines, which share only the files of the build."""

    def map_unordered(
        self, fn: Callable[[Spec], Result], specs: Iterable[Spec]
    ) -> Iterator[Result]:
        """Yield results as soon as they are ready, in any order.

        Specs are taken from the iterable only when a worker can run them, because they may hold
        data.
        """

    def close(self) -> None:
        """Stop the workers; abandon tasks still running after some seconds."""


def check_sendable(recipes: Iterable[Recipe]) -> None:
    """Check that recipes can be sent to other machines.

    Raises:
        ConfigError: A recipe has a function that was passed as an object, or in a file with a
            relative path.
    """
    for recipe in recipes:
        for name, function in recipe.functions().items():
            file = function.rpartition(":")[0]
            is_passed = isinstance(function, PassedFunction)
            if is_passed or (file.endswith(".py") and not os.path.isabs(file)):
                problem = "was passed as an object" if is_passed else "has a relative path"
                raise ConfigError(
                    f"the function {function} {problem}, so other machines cannot load it",
                    remedy=[
                        f"name its file: {setting(name, '/FOLDER/FILE.py:NAME')}",
                        f"use {setting('executor', 'local')}",
                    ],
                )


def map_checked(
    executor: Executor, fn: Callable[[Spec], Result], specs: Iterable[Spec]
) -> Iterator[Result]:
    """Run `Executor.map_unordered`; on other machines, check the versions of the packages first.

    Raises:
        WorkerError: A worker has other versions than this process.
    """
    if executor.far:
        return executor.map_unordered(partial(_run_checked, find_versions(), fn), specs)
    return executor.map_unordered(fn, specs)


def find_versions() -> dict[str, str]:
    """Return the versions of the packages that determine the bytes of a build."""
    packages = ("tokenizers", "gigatoken", "fastokens", "pyarrow")
    return {"sftprep": __version__, **{name: version_of(name) for name in packages}}


def _run_checked(versions: dict[str, str], fn: Callable[[Any], Any], spec: Any) -> Any:
    own = find_versions()
    if own != versions:
        other = [
            f"{name} {own[name]}, not {versions[name]}"
            for name in own
            if own[name] != versions[name]
        ]
        raise WorkerError(
            f"a worker has {', '.join(other)}",
            remedy="install the same versions on all machines: the bytes of a build depend on them",
        )
    return fn(spec)
