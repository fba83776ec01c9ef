"""A build in a store that ends at any point leaves the old build or the new one.

It is killed before each of its changes, or the server of the store fails from any request on. Two
writers that break the rules show that the harness detects failures: one that writes its manifest
first, and one that writes it without a condition.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from secrets import token_hex
from typing import Any

import pytest

from sftprep import build, open_shards, read_manifest, verify
from sftprep.errors import ManifestError, OutputBusy, SftprepError
from sftprep.pipeline import build as build_module
from sftprep.pipeline.output.garbage import collect_garbage
from sftprep.pipeline.output.store import OutputStore
from sftprep.stores.folder import StoreFolder, folder_of
from tests.stores.builds import example_lines, small_settings
from tests.stores.failures import FailingServer, killed_before
from tests.stores.servers import s3_server
from tests.support import thorough


@pytest.fixture
def small(tmp_path, tokenizer_dir):
    """A function that builds two groups, with a rejected record, to a place."""
    inputs = tmp_path / "in"
    inputs.mkdir()
    (inputs / "a.jsonl").write_bytes(example_lines(0, 5) + b"{bad\n")
    (inputs / "b.jsonl").write_bytes(example_lines(5, 9))
    usual = {"overwrite": True, "on_bad_record": "quarantine", "max_rejected": 1}

    def run(output: StoreFolder, **settings: Any):
        settings = small_settings(tokenizer_dir, **usual, **settings)
        return build(str(inputs), output=str(output), **settings).manifest

    return run


@pytest.fixture(params=["memory", "s3"])
def folder(request):
    return request.getfixturevalue(request.param)


def state(folder: StoreFolder) -> str | None:
    """Return the digest of the build that a reader sees, after checking all of it; None if there is
    no build."""
    try:
        manifest = read_manifest(str(folder))
    except ManifestError:
        return None
    assert verify(str(folder)).problems == []
    if manifest.eval:
        assert verify(f"{folder}/eval").problems == []
    assert sum(len(pack.input_ids) for pack in open_shards(str(folder))) == manifest.tokens
    return manifest.digest


def fail_at_each_point(
    folder: StoreFolder,
    before: str | None,
    after: str,
    run: Callable[[], object],
    *,
    failed_at: Callable[[int, Callable[[], object]], bool] = killed_before,
    step: int = 1,
) -> int:
    """Run something that fails at each point, and check that a reader sees one of two builds.

    Args:
        folder: The folder of the build.
        before: The digest of the build that is there; None for none.
        after: The digest of the one that `run` makes.
        run: Builds to the folder.
        failed_at: Runs it with a failure at a point; returns False if it does not have that point.
        step: The points between two failures.

    Returns:
        The number of points.
    """
    for point in range(0, 1_000, step):
        if not failed_at(point, run):
            assert state(folder) == after
            return point
        seen = state(folder)
        assert seen in (before, after), f"at point {point} a reader saw neither build"
        before = seen
    raise AssertionError("the build never ended")


def step_of(folder: StoreFolder) -> int:
    """Return the changes between two failures; a server is much slower than memory."""
    return 1 if folder.url.startswith("memory") else thorough(1, default=3)


LAYOUTS = pytest.mark.parametrize("layout", ["packs", "sequences"])


@LAYOUTS
def test_a_first_build_that_is_killed_ends_in_the_same_files(folder, small, layout):
    settings = {"eval_fraction": 0.3, "layout": layout}
    after = small(folder / "golden", **settings).digest
    names = (folder / "golden").names()
    # Each kind of file is there, so the build was killed before each of them was written.
    kinds = {re.sub(r"(?<=/).*(?=\.)", "*", name) for name in names}
    assert kinds == {
        *("groups/*.json", "groups/*.index", "shards/*.arrow", "rejected/*.jsonl", "manifest.json"),
        *("eval/*.json", "eval/*.index", "eval/*.arrow", "README.md"),
    }
    assert sum(name.startswith("groups/") for name in names) == 4
    place = folder / "o"
    step = step_of(place)
    changes = fail_at_each_point(place, None, after, lambda: small(place, **settings), step=step)
    assert changes > len(names)
    # Killed builds leave the objects by which they checked the store.
    collect_garbage(str(place), datetime.timedelta(seconds=-60))
    assert place.names() == names


@LAYOUTS
def test_a_killed_replacement_leaves_the_old_build_or_the_new_one(folder, small, layout):
    # The shards of layout `sequences` do not depend on the seed.
    old, new = {"shard_tokens": 500, "layout": layout}, {"eval_fraction": 0.3, "layout": layout}
    after = small(folder / "golden", **new).digest
    place = folder / "o"
    before = small(place, **old).digest
    assert before != after
    fail_at_each_point(place, before, after, lambda: small(place, **new), step=step_of(place))


@pytest.fixture
def failing(monkeypatch):
    """A server of an S3 store that fails on request, and its file system without retries."""
    servers: list[FailingServer] = []

    def wrap(app: Any) -> FailingServer:
        servers.append(FailingServer(app))
        return servers[0]

    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with s3_server(wrap) as url:
        import s3fs

        monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
        yield servers[0], folder_of(f"{url}/{token_hex(4)}/o")


@LAYOUTS
@pytest.mark.parametrize("kind", ["down", "lost response, then down", "lost response"])
def test_a_server_that_fails_at_any_request_leaves_the_old_build_or_the_new_one(
    failing, small, layout, kind
):
    server, place = failing
    server.carries_out, server.is_down = kind != "down", kind != "lost response"
    settings = {"eval_fraction": 0.3, "layout": layout}
    after = small(place.parent / "golden", **settings).digest
    before = small(place, shard_tokens=500, layout=layout).digest
    codes = []  # the exit codes of the builds that failed

    def failed_at(request: int, run: Callable[[], object]) -> bool:
        server.requests, server.fails_from = 0, request
        try:
            run()
        except SftprepError as error:
            codes.append(error.exit_code)
        server.fails_from = None
        return server.requests > request

    step = thorough(1, default=6)
    requests = fail_at_each_point(
        place, before, after, lambda: small(place, **settings), failed_at=failed_at, step=step
    )
    assert requests > 25
    # Only what is read once more, or written last and compared, may fail without an error.
    assert set(codes) == {3}
    assert len(codes) * step >= requests - 12


def test_the_harness_detects_a_manifest_that_is_written_first(memory, small, monkeypatch):
    after = small(memory / "golden", seed=1).digest
    place = memory / "o"
    before = small(place, seed=2).digest
    put = StoreFolder.put

    def put_manifest_first(self, files):
        files = list(files)
        works = [path.parents[1] for path, name in files if name.startswith("groups/")]
        put(self, [(work / "manifest.json", "manifest.json") for work in works[:1]] + files)

    monkeypatch.setattr(StoreFolder, "put", put_manifest_first)
    with pytest.raises((AssertionError, OutputBusy)):
        fail_at_each_point(place, before, after, lambda: small(place, seed=1))


def test_the_harness_detects_a_manifest_that_is_written_without_a_condition(
    memory, small, monkeypatch, tmp_path
):
    """Of two builders, the second one must not replace what the first one has just committed."""

    def put_manifest(self, content):
        path = tmp_path / "manifest.json"
        path.write_bytes(content)
        self.root.put([(path, "manifest.json")])

    def race() -> None:
        check = build_module.check_unchanged

        def build_meanwhile(inputs):
            build_module.check_unchanged = check
            small(memory, seed=1, scratch=str(tmp_path / "scratch"))
            check(inputs)

        monkeypatch.setattr(build_module, "check_unchanged", build_meanwhile)
        with pytest.raises(OutputBusy):
            small(memory, seed=2)

    race()
    memory.remove(memory.names())
    monkeypatch.setattr(OutputStore, "_write_manifest", put_manifest)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        race()
