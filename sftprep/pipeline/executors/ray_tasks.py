"""An executor on Ray: one task of one core for each spec.

A cluster of Ray runs the tasks again whose workers or machines died. Only specs and small results
pass through its object store; tokens are read from and written to the files of the build, which all
machines must reach under the same paths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from sftprep.errors import ConfigError, MissingDependency, WorkerError, setting
from sftprep.pipeline.executors.base import Result, Spec

_RETRIES = 2
"""How often Ray runs a task again whose worker died."""
_SPECS_PER_CORE = 2
"""Specs in flight for each core, so that no core waits for this process."""


class RayExecutor:
    """An executor on a cluster of Ray.

    Args:
        address: The address of the cluster, such as "auto" or "10.0.0.1:6379"; None starts a
            cluster on this machine.

    Raises:
        MissingDependency: Ray is not installed.
        ConfigError: The address does not lead to a cluster.
    """

    far = True

    def __init__(self, address: str | None = None) -> None:
        try:
            import ray
        except ImportError as error:
            needed_for = setting("executor", "ray")
            raise MissingDependency("ray", extra="ray", needed_for=needed_for) from error
        self._ray: Any = ray
        self._owns_connection = not ray.is_initialized()
        if self._owns_connection:
            try:
                ray.init(
                    address=address,
                    include_dashboard=False if address is None else None,
                    log_to_driver=False,
                    configure_logging=False,
                )
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise ConfigError(
                    f"cannot connect to a Ray cluster at {address or 'this machine'}: {error}",
                    remedy=(
                        "start one with `ray start --head`, and name it with"
                        f" {setting('ray_address')}"
                    ),
                ) from error

    @property
    def capacity(self) -> int:
        """The number of cores of the cluster now; a cluster may grow and shrink."""
        return max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def map_unordered(
        self, fn: Callable[[Spec], Result], specs: Iterable[Spec]
    ) -> Iterator[Result]:
        """Yield results as soon as they are ready, in any order.

        Raises:
            WorkerError: Workers died repeatedly while they ran the same spec.
            Exception: Any exception that `fn` raises.
        """
        ray = self._ray
        task = ray.remote(num_cpus=1, max_retries=_RETRIES)(_call)
        function = ray.put(fn)
        waiting = iter(specs)
        running: dict[Any, Spec] = {}
        while True:
            for spec in islice(waiting, max(0, _SPECS_PER_CORE * self.capacity - len(running))):
                running[task.remote(function, spec)] = spec
            if not running:
                return
            # All results that are ready are taken at once: a call costs time for each reference.
            ready, _ = ray.wait([*running], num_returns=1)
            more, _ = ray.wait([*running], num_returns=len(running), timeout=0)
            for reference in {*ready, *more}:
                yield self._take_result(reference, running.pop(reference))

    def _take_result(self, reference: Any, spec: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error  # the exception of the function itself
        except (
            self._ray.exceptions.WorkerCrashedError,
            self._ray.exceptions.NodeDiedError,
            self._ray.exceptions.OutOfMemoryError,
        ) as error:
            raise WorkerError(
                f"workers died {_RETRIES + 1} times; the last task was {spec!r:.300}",
                remedy=[
                    "check the logs of Ray for an out-of-memory kill",
                    "give each core more memory",
                ],
            ) from error

    def close(self) -> None:
        """Disconnect from the cluster, if this object connected to it."""
        if self._owns_connection:
            self._ray.shutdown()


def _call(fn: Callable[[Any], Any], spec: Any) -> Any:
    return fn(spec)
