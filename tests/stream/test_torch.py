"""Loaders of torch, torchdata and datasets yield the packs of the stream, and resume exactly."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from torch.utils.data import DataLoader

from sftprep import BuildConfig
from sftprep.errors import EmptyInput, RecordError
from sftprep.stream import PackedStream
from sftprep.torch import PackedDataset, StreamLoader, collate_packs
from tests.stream.plain_packs import plain, plains, rows


def stream_of(source, tokenizer_dir, **settings):
    chosen = {
        "max_length": 256,
        "pack_window": 30,
        "lanes": 4,
        "tokenizer": str(tokenizer_dir),
        **settings,
    }
    return PackedStream(source, config=BuildConfig.of(**chosen))


def ids(row) -> list[int]:
    return row["input_ids"].tolist()


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_stateful_loader(workers, corpus, tokenizer_dir):
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def loader():
        return stateful.StatefulDataLoader(
            PackedDataset(stream_of(corpus, tokenizer_dir)), batch_size=None, num_workers=workers
        )

    straight = loader()
    packs, states = [], []
    for row in straight:
        packs.append(ids(row))
        states.append(straight.state_dict())
    assert sorted(packs) == sorted(p[0] for p in plains(stream_of(corpus, tokenizer_dir)))
    for step in (13, len(packs) - 2):
        again = loader()
        again.load_state_dict(states[step])
        assert [ids(row) for row in again] == packs[step + 1 :]


def test_rows_for_a_plain_loop(corpus, tokenizer_dir):
    loader = DataLoader(
        PackedDataset(stream_of(corpus, tokenizer_dir)), batch_size=3, collate_fn=collate_packs
    )
    expected = list(stream_of(corpus, tokenizer_dir))
    batch = next(iter(loader))
    packs = expected[:3]
    assert batch["input_ids"].tolist() == [[i for pack in packs for i in pack.input_ids.tolist()]]
    targets = sum(int(pack.completion_mask.sum()) - len(pack.seq_lengths) for pack in packs)
    assert int((batch["labels"] != -100).sum()) == targets
    assert int((batch["position_ids"] == 0).sum()) == sum(len(pack.seq_lengths) for pack in packs)


def as_lists(packs):
    return [plain(pack) for pack in packs]


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_loader_keeps_the_global_order(workers, corpus, tokenizer_dir):
    everything = plains(stream_of(corpus, tokenizer_dir))
    loader = StreamLoader(stream_of(corpus, tokenizer_dir), 3, as_lists, workers=workers)
    batches = list(loader)
    assert [len(batch) for batch in batches[:-1]] == [3] * (len(batches) - 1)
    flat = [pack for batch in batches for pack in batch]
    assert sorted(flat) == sorted(everything)
    assert flat[:40] == everything[:40]
    assert loader.state_dict()["epoch"] == 1


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 1), (2, 0)])
def test_stream_loader_resumes_with_another_number_of_workers(before, after, corpus, tokenizer_dir):
    everything = plains(stream_of(corpus, tokenizer_dir))
    first = StreamLoader(stream_of(corpus, tokenizer_dir), 3, as_lists, workers=before)
    batches = iter(first)
    done = [pack for _ in range(8) for pack in next(batches)]
    state = json.loads(json.dumps(first.state_dict()))
    second = StreamLoader(stream_of(corpus, tokenizer_dir), 4, as_lists, workers=after)
    second.load_state_dict(state)
    rest = [pack for batch in second for pack in batch]
    assert done == everything[:24]
    assert sorted(done + rest) == sorted(everything)
    assert rest[:16] == everything[24:40]


def test_a_loader_that_resumes_at_the_end_of_a_pass_starts_the_next(corpus, tokenizer_dir):
    first = StreamLoader(stream_of(corpus, tokenizer_dir), 3, as_lists)
    for _ in first:
        last = json.loads(
            json.dumps(first.state_dict())
        )  # as a trainer, which does not know yet that it was the last batch
    second = StreamLoader(stream_of(corpus, tokenizer_dir), 3, as_lists)
    second.load_state_dict(last)
    assert list(second) == list(first)
    assert first.state_dict()["epoch"] == second.state_dict()["epoch"] == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_and_counts_come_from_workers(workers, tokenizer_dir, tmp_path):
    path = tmp_path / "data.jsonl"
    lines = [json.dumps(row) for row in rows("text", 300)]
    path.write_text("\n".join([*lines[:200], '{"text": 5}', *lines[200:]]) + "\n")
    with pytest.raises(RecordError) as caught:
        list(StreamLoader(stream_of(str(path), tokenizer_dir), 2, as_lists, workers=workers))
    assert caught.value.line == 201
    stream = stream_of(str(path), tokenizer_dir, on_bad_record="quarantine")
    loader = StreamLoader(stream, 2, as_lists, workers=workers)
    assert list(loader)
    assert loader.counts["records"] == 301
    assert loader.counts["rejected.bad_type"] == 1


def test_a_dataset_is_not_divided_among_workers_twice(tokenizer_dir):
    data = datasets.Dataset.from_list(rows("text", 300)).to_iterable_dataset(num_shards=8)
    everything = plains(stream_of(data, tokenizer_dir))
    loader = StreamLoader(stream_of(data, tokenizer_dir), 1, as_lists, workers=2)
    assert sorted(pack for batch in loader for pack in batch) == sorted(everything)


def test_hugging_face_dataset(corpus, tokenizer_dir):
    stream = stream_of(corpus, tokenizer_dir)
    everything = plains(stream_of(corpus, tokenizer_dir))
    data = stream.to_hf()
    assert isinstance(data, datasets.IterableDataset)
    found = [
        (r["input_ids"], r["completion_mask"], r["seq_lengths"], r["position_ids"]) for r in data
    ]
    assert found == everything
    assert [r["input_ids"] for r in data] == [pack[0] for pack in everything], (
        "the same rows each time"
    )
    assert data.features["completion_mask"] == datasets.List(datasets.Value("bool"))
    twice = list(stream.to_hf(epochs=2))
    assert len(twice) == 2 * len(everything)
    split = stream.to_hf(shards=2)
    assert split.num_shards == 2
    rows_of_workers = [
        r["input_ids"].tolist()
        for r in DataLoader(split.with_format("torch"), batch_size=None, num_workers=2)
    ]
    assert sorted(rows_of_workers) == sorted(pack[0] for pack in everything)


RANK = """
import json, os, sys
import torch, torch.distributed as dist
from sftprep import BuildConfig
from sftprep.errors import EmptyInput, RecordError
from sftprep.stream import PackedStream
from sftprep.torch import StreamLoader
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
corpus, tokenizer, out = sys.argv[1:]
config = BuildConfig.of(max_length=256, pack_window=30, lanes=3, tokenizer=tokenizer)
stream = PackedStream(corpus, config=config, rank=rank, world_size=world)
batches = list(StreamLoader(stream, 2, list))
steps = [[[p.input_ids.tolist(), int(p.completion_mask.sum())] for p in batch] for batch in batches]
open(f"{out}/{rank}.json", "w").write(json.dumps(steps))
sys.stdout.flush()
os._exit(0)
"""


def test_all_ranks_make_the_same_number_of_steps(corpus, tokenizer_dir, tmp_path):
    # Three lanes for two ranks: one has twice as many packs.
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    base["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), corpus, str(tokenizer_dir), str(tmp_path)],
            env={**base, "RANK": str(r)},
        )
        for r in range(2)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    steps = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert len(steps[0]) == len(steps[1])
    real = [pack for rank in steps for step in rank for pack in step if pack[1]]
    padding = [pack for rank in steps for step in rank for pack in step if not pack[1]]
    everything = PackedStream(
        corpus,
        config=BuildConfig.of(
            max_length=256, pack_window=30, lanes=3, tokenizer=str(tokenizer_dir)
        ),
    )
    assert sorted(ids for ids, _ in real) == sorted(pack[0] for pack in plains(everything))
    assert len(padding) > 5


@pytest.mark.parametrize("workers", [0, 2])
def test_an_empty_source_is_an_error_with_any_number_of_workers(workers, tokenizer_dir, tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text("\n\n")
    stream = stream_of(str(path), tokenizer_dir)
    with pytest.raises(EmptyInput, match="no sequence that can be trained on"):
        list(StreamLoader(stream, 2, list, workers=workers))
