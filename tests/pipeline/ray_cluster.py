"""Builds on a cluster of Ray on loopback; run by test_ray.py in a network namespace of its own.

Usage: python -m tests.pipeline.ray_cluster FOLDER INPUT TOKENIZER
"""

from __future__ import annotations

import importlib.util
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

from sftprep import build, read_manifest, verify
from sftprep.stores import StoreFolder, folder_of
from tests.stores.servers import s3_server

_SETTINGS = {"max_length": 256, "shard_tokens": 20_000, "group_bytes": 1 << 16}


HAS_STORE = all(map(importlib.util.find_spec, ("s3fs", "moto")))


def digest_of(folder: Path | str, source: str | None, tokenizer: str, **more: Any) -> str:
    report = build(source, output=folder, tokenizer=tokenizer, **_SETTINGS, **more)
    assert len(report.manifest.groups) > 10
    return report.manifest.data_digest


class Saboteur:
    """Calls a function once, as soon as files that match a pattern exist in a folder.

    Args:
        folder: The folder.
        pattern: The pattern.
        action: The function.
    """

    def __init__(self, folder: Path, pattern: str, action: Callable[[], None]) -> None:
        self._folder, self._pattern, self._action = folder, pattern, action
        self.has_acted = False
        self._thread = threading.Thread(target=self._wait, daemon=True)

    def __enter__(self) -> Saboteur:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self.has_acted, f"no {self._pattern} appeared in {self._folder}"

    def _wait(self) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if any(self._folder.glob(self._pattern)):
                self.has_acted = True
                self._action()
                return
            time.sleep(0.002)


def kill_a_worker() -> None:
    workers = [
        process
        for process in psutil.process_iter(["cmdline"])
        # Not an agent: its machine would end with it.
        if (process.info["cmdline"] or [""])[0].startswith(("ray::_call", "ray::IDLE"))
    ]
    assert workers, "no worker of Ray is running"
    busy = [worker for worker in workers if worker.info["cmdline"][0].startswith("ray::_call")]
    (busy or workers)[0].send_signal(signal.SIGKILL)


def check_verification(folder: Path) -> None:
    """Check that Ray finds the problems that this process finds, also if a worker dies."""
    names = [info.name for info in read_manifest(folder).shards]
    for name in names[::5]:
        (folder / "shards" / name).write_bytes(b"damaged")
    expected = verify(folder)
    assert len(expected.problems) == len(names[::5])
    assert verify(folder, executor="ray") == expected
    assert verify(folder, executor="ray", quick=True).problems == expected.problems
    killer = threading.Timer(0.2, kill_a_worker)
    killer.start()
    assert verify(folder, executor="ray") == expected
    killer.join()


def print_builds_in_store(url: str, folder: Path, source: str, tokenizer: str) -> None:
    """Print the digests of builds with inputs, and an output, in a store."""
    inputs = folder_of(f"{url}/in")
    assert isinstance(inputs, StoreFolder)
    inputs.put((path, path.name) for path in Path(source).iterdir())
    for name, output in (
        ("inputs in a store", folder / "from a store"),
        ("inputs and output in a store", f"{url}/build"),
    ):
        scratch = {} if isinstance(output, Path) else {"scratch": str(folder / "scratch")}
        print(name, digest_of(output, str(inputs), tokenizer, executor="ray", **scratch), sep=": ")
        assert verify(output, executor="ray").ok


def main(folder: Path, source: str, tokenizer: str) -> None:
    """Print the digest of each build, one per line."""
    inputs = sorted(map(str, Path(source).iterdir()))
    sources = [
        {"name": "a", "inputs": inputs[:8], "weight": 3},
        {"name": "b", "inputs": inputs[8:], "weight": 1},
    ]
    mixture = {"sources": sources, "duplicates": "drop"}
    print("local", digest_of(folder / "local", source, tokenizer))
    print("mixture, local", digest_of(folder / "local mixture", None, tokenizer, **mixture))
    with ExitStack() as stack:
        # First: the machines of the cluster inherit the variables with its address.
        url = stack.enter_context(s3_server()) if HAS_STORE else None
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        stack.callback(cluster.shutdown)
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        ray.init(address=cluster.address, log_to_driver=False)
        stack.callback(ray.shutdown)
        print("ray", digest_of(folder / "ray", source, tokenizer, executor="ray"))
        if url is not None:
            print_builds_in_store(url, folder, source, tokenizer)
        for name, pattern, settings in (
            ("worker killed in the tokenization", "spill/*.arrow", {}),
            ("worker killed while shards are written", "spill/shards/*/*.arrow", {}),
            ("mixture, worker killed in round 1", "spill/hashes-*.npy", mixture),
            ("mixture, worker killed in the last round", "spill/shards/*/*.arrow", mixture),
        ):
            output = folder / name
            with Saboteur(output, pattern, kill_a_worker):
                records = None if settings else source
                digest = digest_of(output, records, tokenizer, executor="ray", **settings)
            print(name, digest, sep=": ")
        name = "machine killed while shards are written"
        with Saboteur(
            folder / name, "spill/shards/*/*.arrow", lambda: cluster.remove_node(nodes.pop())
        ):
            digest = digest_of(folder / name, source, tokenizer, executor="ray")
        print(name, digest, sep=": ")
        check_verification(folder / "ray")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
