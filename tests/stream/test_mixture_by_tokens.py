"""Mixtures whose weights count tokens: the shares hold in each lane, and states are as small and as
exact as by records."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftprep import BuildConfig
from sftprep.core.ragged import to_offsets
from sftprep.core.types import TokenBatch
from sftprep.errors import ConfigError, MismatchError
from sftprep.shards.reading.pack import Pack
from sftprep.stream import Mixture, PackedStream, open_stream
from sftprep.stream.sources.base import LaneAssignment
from sftprep.stream.sources.mixture import OpenedMixture
from sftprep.stream.sources.open import SequenceLines
from sftprep.stream.sources.sequential import Rows
from tests.stream.plain_packs import plain, rows

BLOCK = 256
"""The most records of a block, within which tokens are estimated."""


def stream_of(source: Any, tokenizer_dir: Path, rank: int = 0, world: int = 1, **more: Any) -> Any:
    chosen = {"max_length": 256, "pack_window": 30, "lanes": 2, **more}
    config = BuildConfig.of(tokenizer=str(tokenizer_dir), **chosen)
    return PackedStream(source, config=config, rank=rank, world_size=world, retry_wait=0.0)


def tokens_of(packs: list[Pack], name: str = "tokens") -> Counter[int]:
    """Return the tokens, or the trained tokens, of each part."""
    found: Counter[int] = Counter()
    for pack in packs:
        at = 0
        for origin, length in zip(pack.origin.tolist(), pack.seq_lengths.tolist(), strict=True):
            trained = int(pack.completion_mask[at + 1 : at + length].sum())
            found[origin >> 44] += trained if name == "trained_tokens" else length
            at += length
    return found


def short_and_long(number: int) -> list[list[dict[str, Any]]]:
    """Return records of few tokens, and records of many of which few are trained."""
    rng = random.Random(3)
    long = [
        {"prompt": "so it goes " * rng.randint(5, 20), "completion": "again " * rng.randint(1, 9)}
        for _ in range(number)
    ]
    return [[{"text": f"{k} so"} for k in range(8 * number)], long]


@pytest.mark.parametrize("mix_by", ["tokens", "trained_tokens"])
def test_the_shares_of_tokens_hold_in_every_lane(tokenizer_dir: Path, mix_by: Any) -> None:
    mixture = Mixture(short_and_long(700), [1, 3], stop="first", mix_by=mix_by)
    by_lane: dict[int, list[Pack]] = {}
    stream = stream_of(mixture, tokenizer_dir, packing="none", pack_window=None)
    for placed in stream.placed():
        by_lane.setdefault(placed.lane, []).append(placed.pack)
    assert len(by_lane) == 2
    for packs in by_lane.values():
        # After the first block, whose tokens per byte are a guess.
        for end in range(8 * BLOCK, len(packs), 100):
            found = tokens_of(packs[:end], mix_by)
            assert found[1] / found.total() == pytest.approx(0.75, abs=0.02)
    by_records = Mixture(short_and_long(700), [1, 3], stop="first")
    found = tokens_of([*stream_of(by_records, tokenizer_dir)], mix_by)
    assert found[1] / found.total() > 0.8


def test_the_packs_of_ranks_are_those_of_one_process(tokenizer_dir: Path) -> None:
    mixture = Mixture(short_and_long(200), [1, 2], mix_by="tokens")
    everything = [
        (p.number, p.lane, plain(p.pack)) for p in stream_of(mixture, tokenizer_dir).placed()
    ]
    ranks = [stream_of(mixture, tokenizer_dir, rank, 2) for rank in range(2)]
    found = [(p.number, p.lane, plain(p.pack)) for rank in ranks for p in rank.placed()]
    assert sorted(found) == sorted(everything)
    assert sum(len(pack[2]) for _, _, pack in everything) == 200 * 9


def test_a_state_resumes_with_the_very_next_pack(tokenizer_dir: Path, corpus: str) -> None:
    talks = rows("messages", 60, seed=5)
    mixture = Mixture([corpus, lambda: iter(talks)], [2, 1], mix_by="trained_tokens")
    straight = stream_of(mixture, tokenizer_dir)
    packs, states = [], [json.dumps(straight.state_dict())]
    for found in straight:
        packs.append(plain(found))
        states.append(json.dumps(straight.state_dict()))
    again = stream_of(mixture, tokenizer_dir)
    for step in range(0, len(packs), 17):
        again.load_state_dict(json.loads(states[step]))
        rest = [plain(found) for found, _ in zip(again, range(6), strict=False)]
        assert rest == packs[step : step + 6]
    by_tokens = stream_of(Mixture([corpus, talks], [2, 1], mix_by="tokens"), tokenizer_dir)
    with pytest.raises(MismatchError):
        by_tokens.load_state_dict(json.loads(states[3]))


def tokens_of_record(origin: int) -> int:
    """Return a number of tokens that says nothing of the bytes of the record."""
    return 2 + (origin * 2654435761 >> 7) % 50 * (1 + origin % 3)


def batch_of(origins: list[int]) -> TokenBatch:
    """Return sequences with the tokens of some records, all of them trained."""
    lengths = np.array([tokens_of_record(origin) for origin in origins], np.int64)
    total = int(lengths.sum())
    mask = np.ones(total, np.bool_)
    return TokenBatch(np.zeros(total, np.int32), to_offsets(lengths), mask, np.arange(len(origins)))


@settings(max_examples=25, deadline=None)
@given(
    chosen=st.lists(st.tuples(st.integers(0, 900), st.floats(0.05, 20)), min_size=1, max_size=4),
    stop=st.sampled_from(["all", "first"]),
    mix_by=st.sampled_from(["tokens", "trained_tokens"]),
)
def test_the_cursor_after_a_block_has_the_tokens_that_were_counted(
    chosen: list[tuple[int, float]], stop: Any, mix_by: Any
) -> None:
    sizes, weights = [size for size, _ in chosen], tuple(weight for _, weight in chosen)
    sources = tuple(
        Rows(SequenceLines([{"text": f"{k}"}] * n), str(k), "text", k, n)
        for k, n in enumerate(sizes)
    )
    opened = OpenedMixture(sources, weights, stop, tuple(range(len(sizes))), mix_by=mix_by)
    reader, cursor, taken = opened.open(LaneAssignment((0,), 1)), None, [0] * len(sizes)
    origins: list[int] = []
    while (block := reader.read(0, cursor)) is not None:
        again = opened.open(LaneAssignment((0,), 1, start={0: cursor})).read(0, cursor)
        assert again is not None
        assert again.origins.tolist() == block.origins.tolist()
        for origin in block.origins.tolist():
            taken[origin >> 44] += tokens_of_record(origin) - (mix_by == "trained_tokens")
        cursor = json.loads(json.dumps(block.cursor_after(batch_of(block.origins.tolist()))))
        assert [position[4] for position in cursor] == taken
        origins += block.origins.tolist()
        # Each block corrects what the one before it has missed.
        if len(origins) > 2 * BLOCK and not any(position[3] for position in cursor):
            shares = [amount / weight for amount, weight in zip(taken, weights, strict=True)]
            assert max(shares) - min(shares) <= BLOCK * 152 / min(weights)
    assert len(origins) == len(set(origins))
    if stop == "all":
        assert len(origins) == sum(sizes)


def test_a_source_without_a_usable_record_does_not_stop_the_others(tokenizer_dir: Path) -> None:
    bad = [{"text": 5}] * 300
    mixture = Mixture([rows("text", 1) + bad, rows("text", 200, seed=2)], [1, 1], mix_by="tokens")
    more = {"on_bad_record": "quarantine", "max_rejected": "100%"}
    stream = stream_of(mixture, tokenizer_dir, **more)
    assert sum(len(pack.seq_lengths) for pack in stream) == 201
    assert sum(n for name, n in stream.counts.items() if name.startswith("rejected.")) == 300


def test_mixtures_by_tokens_are_not_nested_and_take_no_setting_of_builds(
    tokenizer_dir: Path, corpus: str
) -> None:
    inner = Mixture([corpus, rows("text", 9)], [1, 1], mix_by="tokens")
    with pytest.raises(ConfigError, match="cannot be a source of another mixture"):
        Mixture([inner, corpus], [1, 1])
    with pytest.raises(ConfigError, match="mix_by is 'token'"):
        Mixture([corpus], [1], mix_by="token")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="only supported by builds"):
        open_stream(corpus, tokenizer=str(tokenizer_dir), mix_by="tokens")
    outer = Mixture([Mixture([rows("text", 9), corpus], [1, 1]), corpus], [1, 1], mix_by="tokens")
    assert len([*stream_of(outer, tokenizer_dir)]) > 1
