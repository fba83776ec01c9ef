"""Ranks and workers divide the lanes, and produce the same packs however many there are."""

from __future__ import annotations

import json
import pickle

import pytest

from sftprep import BuildConfig
from sftprep.errors import ConfigError
from sftprep.stream import PackedStream
from tests.stream.plain_packs import plain, plains, rows


def stream_of(source, tokenizer_dir, rank=0, world_size=1, order="keep", **settings):
    chosen = {
        "max_length": 256,
        "pack_window": 30,
        "lanes": 8,
        "tokenizer": str(tokenizer_dir),
        **settings,
    }
    return PackedStream(
        source, config=BuildConfig.of(**chosen), rank=rank, world_size=world_size, order=order
    )


def kinds(corpus):
    records = rows("text", 700, seed=5)
    return {"files": corpus, "function": lambda: iter(records)}


@pytest.mark.parametrize("kind", ["files", "function"])
@pytest.mark.parametrize("world", [2, 3, 8])
def test_ranks_make_the_packs_of_one(kind, world, corpus, tokenizer_dir):
    source = kinds(corpus)[kind]
    whole = stream_of(source, tokenizer_dir)
    everything = [(p.number, p.lane, plain(p.pack)) for p in whole.placed()]
    assert [place[:2] for place in everything] == sorted(place[:2] for place in everything)
    ranks = [stream_of(source, tokenizer_dir, rank, world) for rank in range(world)]
    shared = [[(p.number, p.lane, plain(p.pack)) for p in rank.placed()] for rank in ranks]
    assert sorted(p for rank in shared for p in rank) == sorted(everything)
    # If the ranks divide the lanes evenly, and while no lane has ended, the packs of all
    # ranks in a step are the next ones of the global order.
    if world != 3:
        steps = (
            min(len({n for n, lane, _ in everything if lane == k}) for k in range(8)) * 8 // world
        )
        assert [rank[step] for step in range(steps) for rank in shared] == everything[
            : steps * world
        ]


def test_each_record_is_in_one_pack_of_one_rank(corpus, tokenizer_dir):
    ranks = [stream_of(corpus, tokenizer_dir, rank, 4) for rank in range(4)]
    lines = sorted(
        rank.locate(int(origin))[1] for rank in ranks for pack in rank for origin in pack.origin
    )
    assert lines == list(range(1, 801))
    assert sum(rank.counts["records"] for rank in ranks) == 800


@pytest.mark.parametrize("order", ["keep", "shuffle"])
@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 2), (2, 3), (3, 1)])
def test_another_number_of_ranks_resumes_the_same_stream(
    before, after, order, corpus, tokenizer_dir
):
    everything = plains(stream_of(corpus, tokenizer_dir, order=order))
    ranks = [stream_of(corpus, tokenizer_dir, rank, before, order) for rank in range(before)]
    packs, iterators = [], [iter(rank) for rank in ranks]
    for _ in range(24 // before):
        packs += [plain(next(iterator)) for iterator in iterators]
    states = json.loads(json.dumps([rank.state_dict() for rank in ranks]))
    if before != 3:
        assert packs == everything[:24]
    rest = []
    for rank in range(after):
        stream = stream_of(corpus, tokenizer_dir, rank, after, order)
        stream.load_state_dict(states)
        rest.append(plains(stream))
    assert sorted(packs + [p for part in rest for p in part]) == sorted(everything)
    if before != 3 and after != 3:
        together = [pack for step in range(8 // after) for pack in (part[step] for part in rest)]
        assert together == everything[24:32]


def test_shares_of_a_rank(corpus, tokenizer_dir):
    rank = stream_of(corpus, tokenizer_dir, 1, 2)
    parts = [rank.share(worker, 3) for worker in range(3)]
    assert sorted(lane for part in parts for lane in part.owned) == [1, 3, 5, 7]
    assert sorted(p for part in parts for p in plains(part)) == sorted(plains(rank))


def test_a_pickled_stream_resumes_at_the_same_position(corpus, tokenizer_dir):
    stream = stream_of(corpus, tokenizer_dir)
    packs = iter(stream)
    for _ in range(11):
        next(packs)
    copy = pickle.loads(pickle.dumps(stream))
    assert plains(copy) == plains(packs)


def test_more_ranks_than_lanes_are_rejected(corpus, tokenizer_dir):
    with pytest.raises(ConfigError, match="8 lanes cannot be divided among 9 ranks"):
        stream_of(corpus, tokenizer_dir, 0, 9)
    with pytest.raises(ConfigError, match="rank is 2 of 2"):
        stream_of(corpus, tokenizer_dir, 2, 2)


def test_a_small_source_still_reaches_every_lane(tokenizer_dir, tmp_path):
    path = tmp_path / "small.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows("text", 30)))
    placed = list(stream_of(lambda: iter(rows("text", 30)), tokenizer_dir).placed())
    assert {pack.lane for pack in placed} == set(range(8))
    packs = list(stream_of(str(path), tokenizer_dir))
    assert sum(len(pack.seq_lengths) for pack in packs) == 30


def test_padding_trains_nothing(corpus, tokenizer_dir):
    pack = stream_of(corpus, tokenizer_dir).padding()
    assert not pack.completion_mask.any()
    assert len(pack.input_ids) == pack.seq_lengths.sum() == 2
