"""Shards are fetched in the background, in the order in which they will be used."""

from __future__ import annotations

import os
import threading
from hashlib import sha256
from pathlib import Path

import pytest

from sftprep import build, open_shards
from sftprep.core.file_locks import hold_lock
from sftprep.errors import ShardError
from sftprep.shards.reading import shards as reading
from sftprep.shards.reading.shards import Shards
from sftprep.stores import fetch_ahead
from sftprep.stores.fetch_ahead import FetchAhead, NeededFile
from sftprep.stores.folder import StoreFolder
from sfttrain.data.batching import BatchDataset
from sfttrain.data.step_plan import BuildOrder, StepPlan
from tests.stores.builds import example_lines, put_object, shard_names, small_settings


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("SFTPREP_CACHE", str(folder))
    return folder


@pytest.fixture
def fetched(monkeypatch) -> list[tuple[str, bool]]:
    """The objects that were fetched, apart from the descriptions of groups: the name of each, and
    whether the main thread fetched it."""
    found: list[tuple[str, bool]] = []
    fetch = StoreFolder.fetch

    def noted(self, name, path):
        is_main = threading.current_thread() is threading.main_thread()
        if not name.endswith(".json"):
            found.append((name.rpartition("/")[2], is_main))
        fetch(self, name, path)

    monkeypatch.setattr(StoreFolder, "fetch", noted)
    return found


def build_in(memory: StoreFolder, tmp_path: Path, tokenizer_dir: Path, **settings: str) -> Shards:
    """Build two groups in a store, and open the build."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(example_lines(0, 25))
    (tmp_path / "in" / "b.jsonl").write_bytes(example_lines(25, 50))
    settings = small_settings(tokenizer_dir, **{"shard_tokens": 300, **settings})
    build(str(tmp_path / "in"), output=str(memory), **settings)
    return open_shards(str(memory))


def names_of(shards: Shards) -> list[str]:
    return [name.rpartition("/")[2] for name in shard_names(shards.manifest)]


def first_uses(shards: Shards, packs: list[int]) -> list[str]:
    """Return the names of the shards of packs, in the order of their first use."""
    names = dict.fromkeys(shards._find_info(shards._find_shard(pack)[0]).name for pack in packs)
    return [name.rpartition("/")[2] for name in names]


def test_the_next_shards_are_fetched_in_order_and_up_to_a_number(
    memory, tmp_path, tokenizer_dir, fetched
):
    shards = build_in(memory, tmp_path, tokenizer_dir)
    assert len(names_of(shards)) > reading._MOST_AHEAD + 2
    packs = [*reversed(range(len(shards)))]
    shards.fetch_ahead(packs)
    shards._ahead.wait()
    wanted = first_uses(shards, packs)[: reading._MOST_AHEAD]
    assert fetched == [(name, False) for name in wanted]
    for pack in packs:
        if first_uses(shards, [pack])[0] in wanted:
            shards[pack]
    assert len(fetched) == len(wanted)


def test_an_iteration_fetches_each_shard_once(memory, tmp_path, tokenizer_dir, fetched):
    shards = build_in(memory, tmp_path, tokenizer_dir)
    for pack in shards:
        assert len(pack.input_ids)
        shards._ahead.wait()  # so that no shard is used before the thread has fetched it
    first, *others = names_of(shards)
    assert (first, True) in fetched
    assert [each for each in fetched if each[0] != first] == [(name, False) for name in others]


def test_the_trainer_fetches_the_shards_of_its_next_batches(
    memory, tmp_path, tokenizer_dir, fetched
):
    shards = build_in(memory, tmp_path, tokenizer_dir)
    order = BuildOrder.of(shards, 1, None)
    plan = StepPlan(packs=len(shards), rows=2, accumulation=2, seed=3, build=order)
    batches = BatchDataset(shards, plan, 0)
    seen = []
    for number in range(plan.batches):
        packs = batches.packs(1, number)
        missing = {*first_uses(shards, packs)} - {name for name, _ in fetched}
        assert not (number and missing), "a shard was not fetched before its use"
        seen += [pack.input_ids.tolist() for pack in batches.__getitems__((1, number))]
        shards._ahead.wait()
    assert sorted(seen) == sorted(pack.input_ids.tolist() for pack in shards)
    assert len(fetched) == len(names_of(shards))


def test_groups_of_stored_sequences_are_fetched_ahead(memory, tmp_path, tokenizer_dir, fetched):
    shards = build_in(memory, tmp_path, tokenizer_dir, layout="sequences")
    assert len(shards.manifest.groups) > 1
    last = len(shards) - 1
    shards.fetch_ahead([last])
    shards._ahead.wait()
    count = len(fetched)
    assert {Path(name).suffix for name, _ in fetched} >= {".arrow", ".index"}
    assert not any(is_main for _, is_main in fetched)
    assert len(shards[last].input_ids)
    assert len(fetched) == count


def test_an_error_in_the_background_is_raised_at_the_use(memory, tmp_path, tokenizer_dir, fetched):
    shards = build_in(memory, tmp_path, tokenizer_dir)
    first = first_uses(shards, [0])[0]
    (path,) = (name for name in memory.names() if name.endswith(first))
    content = memory.read_range(path, 0, 1 << 20)
    memory.remove([path])
    shards.fetch_ahead(range(len(shards)))
    shards._ahead.wait()
    for _ in range(2):
        with pytest.raises(ShardError, match="is missing"):
            shards[0]
    put_object(memory, path, content, tmp_path)
    assert len(shards[0].input_ids)


def test_a_request_takes_at_most_half_of_the_cache(memory, tmp_path, fetched, monkeypatch):
    monkeypatch.setenv("SFTPREP_CACHE_GB", "0.000002")  # 2,000 bytes
    files = []
    for name in "abcd":
        content = name.encode() * 400
        put_object(memory, name, content, tmp_path)
        digest = sha256(content).hexdigest()
        files.append(NeededFile(name, digest, len(content)))
    ahead = FetchAhead(memory)
    ahead.request(files)
    ahead.wait()
    assert [name for name, _ in fetched] == ["a", "b"]


def test_a_later_request_replaces_the_one_before(memory, tmp_path, monkeypatch):
    names, begun, may_end = [], threading.Event(), threading.Event()

    def slow_fetch(_folder, name, *_):
        names.append(name)
        begun.set()
        may_end.wait(10)
        return threading.Lock()

    monkeypatch.setattr(fetch_ahead, "local_file", slow_fetch)
    ahead = FetchAhead(memory)
    ahead.request([NeededFile(name, "", 0) for name in "abc"])
    begun.wait(10)
    ahead.request([NeededFile(name, "", 0) for name in "cd"])
    may_end.set()
    ahead.wait()
    assert names == ["a", "c", "d"]


def test_a_forked_process_fetches_ahead_by_itself(memory, tmp_path, tokenizer_dir):
    shards = build_in(memory, tmp_path, tokenizer_dir)
    shards.fetch_ahead([0])
    shards._ahead.wait()
    child = os.fork()
    if child == 0:
        is_done = False
        try:
            shards.fetch_ahead([len(shards) - 1])
            thread = shards._ahead._thread
            shards._ahead.wait()
            is_done = thread is not None or len(shards[len(shards) - 1].input_ids) > 0
        finally:
            os._exit(0 if is_done else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_lock_that_is_held_during_a_fork_ends_with_its_block(tmp_path):
    """A loader worker is forked while the thread fetches; it must not keep the lock."""
    path = tmp_path / "lock"
    read_end, write_end = os.pipe()
    with hold_lock(path.open("ab"), path):
        child = os.fork()
        if child == 0:
            os.read(read_end, 1)
            os._exit(0)
    with hold_lock(path.open("ab"), path):
        pass
    os.write(write_end, b"x")
    assert os.waitpid(child, 0)[1] == 0
    os.close(read_end)
    os.close(write_end)


def test_a_local_build_takes_no_pack_of_the_order(tmp_path, tokenizer_dir):
    (tmp_path / "rows.jsonl").write_bytes(example_lines(0, 5))
    settings = small_settings(tokenizer_dir)
    build(str(tmp_path / "rows.jsonl"), output=str(tmp_path / "o"), **settings)
    order = iter(range(1))
    open_shards(tmp_path / "o").fetch_ahead(order)
    assert [*order] == [0]
