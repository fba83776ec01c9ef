"""Any object with the interface of an executor runs a build, with the same bytes."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sftprep import build
from sftprep.errors import ConfigError, MissingDependency, WorkerError
from sftprep.pipeline.executors import base
from sftprep.pipeline.executors.base import Executor
from tests.conftest import EXAMPLES
from tests.pipeline.builds import content

_WORKER = """
import pickle, sys
fn, spec = pickle.load(sys.stdin.buffer)
sys.stdout.buffer.write(pickle.dumps(fn(spec)))
"""


class OtherMachine:
    """Runs each task in a process of its own, in another folder, the last one first."""

    capacity = 3
    far = True

    def __init__(self, folder: Path) -> None:
        self.folder, self.tasks, self.closed = folder, 0, False

    def map_unordered(self, fn: Callable[[Any], Any], specs: Iterable[Any]) -> Iterator[Any]:
        for spec in reversed(list(specs)):
            self.tasks += 1
            done = subprocess.run(
                [sys.executable, "-c", _WORKER],
                input=pickle.dumps((fn, spec)),
                stdout=subprocess.PIPE,
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                check=True,
            )
            yield pickle.loads(done.stdout)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def settings(tokenizer_dir: Path) -> dict[str, Any]:
    return {"tokenizer": tokenizer_dir, "max_length": 256, "shard_tokens": 5000}


def test_another_machine_makes_the_same_bytes(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [EXAMPLES / "data" / name for name in ("chats.jsonl", "qa.jsonl")]
    monkeypatch.chdir(EXAMPLES)
    names = [os.path.relpath(path) for path in inputs]
    settings |= {"group_bytes": 1 << 16}
    here = build(names, output=tmp_path / "here", **settings)
    (tmp_path / "elsewhere").mkdir()
    executor = OtherMachine(tmp_path / "elsewhere")
    assert isinstance(executor, Executor)
    monkeypatch.chdir(EXAMPLES)
    there = build(names, output=os.path.relpath(tmp_path / "there"), executor=executor, **settings)
    assert content(there.folder) == content(here.folder)
    assert executor.tasks == len(here.manifest.groups) == 3
    assert not executor.closed  # the caller closes it
    assert there.workers == 3


def test_what_needs_all_records_in_order_is_refused_on_other_machines(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (EXAMPLES / "data" / "qa.jsonl", {"pack_window": 16}, "pack_window"),
        (EXAMPLES / "data" / "qa.jsonl", {"limit": 5}, "limit"),
        ([{"text": "a b"}], {}, "data in memory"),
    ]
    for data, more, what in cases:
        with pytest.raises(ConfigError, match=f"{what} cannot be used on several machines"):
            build(data, output=tmp_path / "o", executor=OtherMachine(tmp_path), **settings, **more)
        assert not (tmp_path / "o").exists()


def test_a_machine_with_other_versions_is_refused(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Older(OtherMachine):
        def map_unordered(self, fn: Callable[[Any], Any], specs: Iterable[Any]) -> Iterator[Any]:
            for spec in specs:
                with monkeypatch.context() as context:
                    context.setattr(base, "__version__", "0.0.1")
                    result = fn(spec)
                yield result

    with pytest.raises(WorkerError, match=r"a worker has sftprep 0\.0\.1, not"):
        build(
            EXAMPLES / "data" / "qa.jsonl",
            output=tmp_path / "o",
            executor=Older(tmp_path),
            **settings,
        )
    assert not (tmp_path / "o" / "manifest.json").exists()


def test_functions_that_other_machines_cannot_load_are_refused(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.py").write_text("def keep(record):\n    return record\n")
    monkeypatch.chdir(tmp_path)
    for transform, problem in ((lambda r: r, "as an object"), ("own.py:keep", "a relative path")):
        with pytest.raises(ConfigError, match=problem):
            build(
                EXAMPLES / "data" / "qa.jsonl",
                output=tmp_path / "o",
                executor=OtherMachine(tmp_path),
                transform=transform,
                **settings,
            )
    assert not (tmp_path / "o").exists()


def test_a_missing_ray_names_its_extra(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependency, match=r"needs the package ray\n.*sftprep\[ray\]"):
        build(EXAMPLES / "data" / "qa.jsonl", output=tmp_path / "o", executor="ray", **settings)
