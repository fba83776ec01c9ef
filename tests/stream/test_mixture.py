"""Mixtures: the shares of the sources hold from the first record on, and records are located."""

from __future__ import annotations

import json
from collections import Counter

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftprep import BuildConfig
from sftprep.core.types import Rejected, TokenBatch
from sftprep.errors import ConfigError
from sftprep.stream import Mixture, PackedStream
from sftprep.stream.sources.base import LaneAssignment
from sftprep.stream.sources.line_files import LineFiles
from sftprep.stream.sources.merged_batches import merge_batches
from sftprep.stream.sources.mixture import OpenedMixture
from sftprep.stream.sources.open import SequenceLines
from sftprep.stream.sources.sequential import Rows
from tests.stream.plain_packs import plain, plains, rows
from tests.support import thorough


def stream_of(source, tokenizer_dir, rank=0, world_size=1, order="keep", **settings):
    chosen = {
        "max_length": 256,
        "pack_window": 30,
        "lanes": 4,
        "tokenizer": str(tokenizer_dir),
        **settings,
    }
    config = BuildConfig.of(**chosen)
    return PackedStream(
        source, config=config, rank=rank, world_size=world_size, order=order, retry_wait=0.0
    )


def marked(mark, count):
    """Records of about equal length, so that packing puts those of no source first."""
    return [{"text": f"{mark} {k:05}"} for k in range(count)]


def written(path, records):
    path.write_text("".join(json.dumps(row) + "\n" for row in records), encoding="utf-8")
    return str(path)


def counts_of(stream):
    return Counter(int(origin) >> 44 for found in stream for origin in found.origin)


# --- shares ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[800, 800], [1600, 90], [37, 2000]])
@pytest.mark.parametrize("weights", [[9, 1], [1, 9], [1, 1]])
def test_small_sources_in_many_lanes_hold_their_shares(sizes, weights, tokenizer_dir):
    mixture = Mixture([marked("a", sizes[0]), marked("b", sizes[1])], weights, stop="first")
    counts = counts_of(stream_of(mixture, tokenizer_dir, lanes=16))
    first = min((0, 1), key=lambda k: sizes[k] / weights[k])
    other = 1 - first
    # The records of a source are dealt one by one: the last few may go to lanes where the other one
    # ends first.
    assert sizes[first] - 1 <= counts[first] <= sizes[first]
    assert counts[other] == pytest.approx(sizes[first] * weights[other] / weights[first], abs=3)


def test_the_shares_hold_at_every_moment(tokenizer_dir):
    mixture = Mixture(
        [marked("a", 4000), marked("b", 4000), marked("c", 4000)], [6, 3, 1], stop="first"
    )
    seen, number = Counter(), 0
    for found in stream_of(mixture, tokenizer_dir, lanes=4):
        seen.update(int(origin) >> 44 for origin in found.origin)
        number = sum(seen.values())
        for k, share in enumerate((0.6, 0.3, 0.1)):
            # What a window of 30 in each of 4 lanes has not given yet, and a record or two of each
            # lane.
            assert abs(seen[k] - number * share) <= 4 * (30 * share + 2)
    assert seen[0] == 4000
    assert seen[1] == pytest.approx(2000, abs=4)
    assert seen[2] == pytest.approx(667, abs=4)


def test_in_each_lane_after_every_record(tokenizer_dir):
    mixture = Mixture([marked("a", 900), marked("b", 900)], [9, 1], stop="first")
    seen = {lane: Counter() for lane in range(3)}
    for placed in stream_of(
        mixture, tokenizer_dir, lanes=3, packing="none", pack_window=None
    ).placed():
        counts = seen[placed.lane]
        counts[int(placed.pack.origin[0]) >> 44] += 1
        assert abs(counts[1] - sum(counts.values()) / 10) < 1
    assert sum(counts[0] for counts in seen.values()) == 900


def mixed_of(sizes, weights, stop):
    sources = tuple(
        Rows(SequenceLines(marked("abcd"[k], n)), "abcd"[k], "text", k, n)
        for k, n in enumerate(sizes)
    )
    return OpenedMixture(sources, tuple(map(float, weights)), stop, tuple(range(len(sizes))))


def blocks_of(source, lane, lanes, *, reopen=False):
    """Return the cursors and blocks of a lane, read by one reader or each by a new one."""
    cursor, found = None, []
    reader = source.open(LaneAssignment((lane,), lanes))
    while (block := reader.read(lane, cursor)) is not None:
        found.append((cursor, block))
        cursor = json.loads(json.dumps(block.next_cursor))
        if reopen:
            reader = source.open(LaneAssignment((lane,), lanes, start={lane: cursor}))
    return found


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 300), st.floats(0.05, 20)), min_size=1, max_size=4),
    st.sampled_from(["all", "first"]),
    st.integers(1, 5),
)
def test_the_rule_of_the_turns(chosen, stop, lanes):
    sizes, weights = [size for size, _ in chosen], [weight for _, weight in chosen]
    for lane in range(lanes):
        found = blocks_of(mixed_of(sizes, weights, stop), lane, lanes)
        again = blocks_of(mixed_of(sizes, weights, stop), lane, lanes, reopen=True)
        assert [b.origins.tolist() for _, b in found] == [b.origins.tolist() for _, b in again]
        origins = [int(origin) for _, block in found for origin in block.origins]
        there = [len(range((lane - k) % lanes, size, lanes)) for k, size in enumerate(sizes)]
        for k in range(len(sizes)):
            rows_of = [origin & ((1 << 44) - 1) for origin in origins if origin >> 44 == k]
            assert rows_of == list(range((lane - k) % lanes, sizes[k], lanes))[: len(rows_of)]
        taken = Counter(origin >> 44 for origin in origins)
        if stop == "all":
            assert [taken[k] for k in range(len(sizes))] == there
        else:
            last = min(n / weight for n, weight in zip(there, weights, strict=True))
            assert all(abs(taken[k] - last * weight) < 1 + 1e-6 for k, weight in enumerate(weights))
            assert any(taken[k] == n for k, n in enumerate(there))
        seen = [0] * len(sizes)
        for number, origin in enumerate(origins, 1):
            seen[origin >> 44] += 1
            if any(seen[k] == there[k] for k in range(len(sizes))) or 0 in there:
                break
            shares = [weight / sum(weights) for weight in weights]
            most = max(1, len(sizes) - 1)
            assert all(
                abs(seen[k] - number * share) < most + 1e-6 for k, share in enumerate(shares)
            )


def test_a_lane_without_a_record_of_a_source(tokenizer_dir):
    few, many = marked("a", 2), marked("b", 400)
    counts = counts_of(
        stream_of(Mixture([few, many], [1, 3], stop="first"), tokenizer_dir, lanes=4)
    )
    assert counts == {
        0: 2,
        1: 6,
    }  # two lanes have one record of the first source; the other two end at once
    assert counts_of(stream_of(Mixture([few, many], [1, 3]), tokenizer_dir, lanes=4)) == {
        0: 2,
        1: 400,
    }


def test_whitespace_lines_are_not_counted_as_records(tmp_path):
    lines = [line for k in range(120) for line in (json.dumps({"text": f"{k:05}"}), "", "  ")]
    path = tmp_path / "blank.jsonl"
    path.write_text("\n".join(lines) + "\n")
    size = path.stat().st_size
    file = LineFiles((str(path),), ("f",), ("text",), (size,), 4096, 0)
    other = Rows(SequenceLines(marked("b", 500)), "b", "text", 1, 500)
    source = OpenedMixture((file, other), (1.0, 1.0), "first", (0, 1))
    found = blocks_of(source, 0, 1)
    data = [
        line for _, block in found for group in block.groups for line in group.data.splitlines()
    ]
    assert all(
        len(block.origins) == sum(len(group.positions) for group in block.groups)
        for _, block in found
    )
    assert sum(b'"b ' in line for line in data) == pytest.approx(120, abs=1)
    assert sum(1 for line in data if line.strip()) == pytest.approx(240, abs=1)


# --- packs ----------------------------------------------------------------------------------------


def various(corpus, tmp_path):
    """Sources of every kind, of two formats, and a mixture in the mixture."""
    shards = datasets.Dataset.from_list(rows("text", 300, seed=4)).to_iterable_dataset(num_shards=4)
    talks = written(tmp_path / "talks.jsonl", rows("messages", 150, seed=5))
    inner = Mixture([lambda: iter(rows("alpaca", 120, seed=6)), talks], [2, 1])
    return Mixture([corpus, inner, shards], [4, 2, 1], stop="all")


def test_each_record_is_used_once_and_is_located(corpus, tokenizer_dir, tmp_path):
    stream = stream_of(various(corpus, tmp_path), tokenizer_dir, max_length=2048)
    where = [stream.locate(int(origin)) for found in stream for origin in found.origin]
    assert len(set(where)) == len(where) == 800 + 120 + 150 + 300
    assert sorted(line for name, line in where if name == corpus) == list(range(1, 801))
    assert stream.counts["records"] == 1370
    tokens = Counter(
        found.input_ids[begin : begin + n].tobytes()
        for found in stream
        for begin, n in bounds(found)
    )
    alone = PackedStream(corpus, config=stream.config)
    assert all(
        tokens[found.input_ids[begin : begin + n].tobytes()]
        for found in alone
        for begin, n in bounds(found)
    )


def bounds(pack):
    return zip(np.cumsum(pack.seq_lengths) - pack.seq_lengths, pack.seq_lengths, strict=True)


@pytest.mark.parametrize("order", ["keep", "shuffle"])
def test_resume_at_every_step(order, tokenizer_dir, tmp_path):
    source = various(written(tmp_path / "texts.jsonl", rows("text", 300)), tmp_path)
    straight = stream_of(source, tokenizer_dir, order=order)
    packs, states = [], [json.loads(json.dumps(straight.state_dict()))]
    for found in straight:
        packs.append((plain(found), found.origin.tolist()))
        states.append(json.loads(json.dumps(straight.state_dict())))
    assert len(packs) > 80
    again = stream_of(source, tokenizer_dir, order=order)
    for step in range(0, len(packs), thorough(1, default=5) if order == "keep" else 9):
        again.load_state_dict(states[step])
        rest = [
            (plain(found), found.origin.tolist()) for found, _ in zip(again, range(8), strict=False)
        ]
        assert rest == packs[step : step + 8], f"after {step} packs"
    for step in range(0, len(packs), 30):
        again.load_state_dict(states[step])
        assert [(plain(found), found.origin.tolist()) for found in again] == packs[step:]
        assert again.counts == straight.counts


@pytest.mark.parametrize("stop", ["all", "first"])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_make_the_packs_of_one(world, stop, corpus, tokenizer_dir):
    mixture = Mixture([corpus, rows("messages", 200, seed=7)], [3, 1], stop=stop)
    everything = [
        (p.number, p.lane, plain(p.pack)) for p in stream_of(mixture, tokenizer_dir).placed()
    ]
    ranks = [stream_of(mixture, tokenizer_dir, rank, world) for rank in range(world)]
    assert sorted(
        (p.number, p.lane, plain(p.pack)) for rank in ranks for p in rank.placed()
    ) == sorted(everything)


class Cut:
    """Records of a connection that is cut after the given numbers of records, one per opening."""

    def __init__(self, records, after):
        self.records, self.after, self.opened = records, after, 0

    def __call__(self):
        self.opened += 1
        cut = self.opened <= len(self.after)
        yield from self.records[: self.after[self.opened - 1]] if cut else self.records
        if cut:
            raise ConnectionResetError("cut")


def test_a_source_that_raises_does_not_restart_the_others(tokenizer_dir):
    records, others = rows("text", 500), rows("text", 900, seed=8)
    settings = {"lanes": 2}
    whole = plains(
        stream_of(
            Mixture([lambda: iter(others), lambda: iter(records)], [2, 1]),
            tokenizer_dir,
            **settings,
        )
    )
    steady = Cut(others, [])
    cut = Cut(
        records, [0, 100, 0, 17, 201, 200, 333, 499]
    )  # the first two are for a look at the first records
    stream = stream_of(Mixture([steady, cut], [2, 1]), tokenizer_dir, **settings)
    opened = steady.opened
    assert plains(stream) == whole
    assert cut.opened == 9
    assert steady.opened == opened + 1


def test_bad_records_of_a_mixture_are_located(corpus, tokenizer_dir, tmp_path):
    path = tmp_path / "bad.jsonl"
    lines = [json.dumps(row) for row in rows("messages", 90)]
    path.write_text("\n".join([*lines[:50], '{"messages": 5}', *lines[50:], "{bad"]) + "\n")
    stream = stream_of(
        Mixture([str(path), corpus], [1, 2]), tokenizer_dir, on_bad_record="quarantine"
    )
    assert sum(len(found.seq_lengths) for found in stream) == 890
    assert sorted((where, line) for where, line, _ in stream.rejected) == [
        (str(path), 51),
        (str(path), 92),
    ]
    assert stream.counts["records"] == 892


def test_groups_are_put_together_in_the_order_of_their_records():
    one = TokenBatch(
        np.array([1, 2, 3], np.int32),
        np.array([0, 1, 3]),
        np.array([True, False, True]),
        np.array([0, 2]),
    )
    one.rejected, one.counts = [Rejected(1, 0, "bad_json", "", "")], {"records": 3}
    weights = np.array([0.5, 0.5, 2.0, 2.0], np.float32)
    two = TokenBatch(
        np.array([7, 7, 8, 8], np.int32),
        np.array([0, 2, 4]),
        np.ones(4, np.bool_),
        np.array([0, 0]),
        loss_weights=weights,
    )
    two.counts = {"records": 1}
    both = merge_batches([one, two], [np.array([0, 1, 3]), np.array([2])])
    assert both.input_ids.tolist() == [1, 7, 7, 8, 8, 2, 3]
    assert both.line_of.tolist() == [0, 2, 2, 3]
    assert both.offsets.tolist() == [0, 1, 3, 5, 7]
    assert both.completion_mask.tolist() == [True, True, True, True, True, False, True]
    assert both.loss_weights.tolist() == [1, 0.5, 0.5, 2, 2, 1, 1]
    assert [bad.line for bad in both.rejected] == [1]
    assert both.counts == {"records": 4}


def test_invalid_mixtures_are_rejected(corpus):
    for sources, weights, stop in (
        ([corpus] * 2, [1], "all"),
        ([corpus], [0], "all"),
        ([corpus] * 2, [1, 10**400], "all"),
        ([], [], "all"),
        ([corpus], [1], "last"),
    ):
        with pytest.raises(ConfigError):
            Mixture(sources, weights, stop)
