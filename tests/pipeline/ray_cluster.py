"""Builds on a cluster of Ray on loopback; run by test_ray.py in a network namespace of its own.

Usage: python -m tests.pipeline.ray_cluster FOLDER INPUT TOKENIZER
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

from sftprep import build


def digest_of(folder: Path, source: str, tokenizer: str, **more: Any) -> str:
    settings = {"tokenizer": tokenizer, "max_length": 256, "shard_tokens": 20_000}
    return build(source, output=folder, **settings, **more).manifest.data_digest


class Saboteur:
    """Calls a function once, when the first unit of a stage is done."""

    def __init__(self, stage: str, action: Any) -> None:
        self._stage, self._action, self._done = stage, action, False

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == self._stage and not self._done:
            self._done = True
            self._action()


def kill_a_worker() -> None:
    workers = [
        process
        for process in psutil.process_iter(["cmdline"])
        # Not an agent: its machine would end with it.
        if (process.info["cmdline"] or [""])[0].startswith(("ray::_call", "ray::IDLE"))
    ]
    assert workers, "no worker of Ray is running"
    workers[0].send_signal(signal.SIGKILL)


def main(folder: Path, source: str, tokenizer: str) -> None:
    """Print the digest of each build, one per line."""
    print("local", digest_of(folder / "local", source, tokenizer))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        print("ray", digest_of(folder / "ray", source, tokenizer, executor="ray"))
        for stage in ("tokenize", "write"):
            saboteur = Saboteur(stage, kill_a_worker)
            name = f"worker killed in {stage}"
            print(
                name,
                digest_of(folder / name, source, tokenizer, executor="ray", progress=saboteur),
                sep=": ",
            )
        saboteur = Saboteur("tokenize", lambda: cluster.remove_node(nodes.pop()))
        name = "machine killed"
        print(
            name,
            digest_of(folder / name, source, tokenizer, executor="ray", progress=saboteur),
            sep=": ",
        )
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
