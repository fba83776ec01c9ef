"""A new stream with a state from any point of another one yields exactly the remaining packs."""

from __future__ import annotations

import json

import datasets
import pytest

from sftprep import BuildConfig
from sftprep.errors import ConfigError, MismatchError
from sftprep.stream import Mixture, PackedStream
from sftprep.stream.sources import line_files
from tests.stream.plain_packs import plain, plains, rows
from tests.support import thorough


def source_of(kind: str, corpus: str):
    records = rows("text", 700, seed=3)
    data = datasets.Dataset.from_list(records)
    few, many = data.to_iterable_dataset(num_shards=2), data.to_iterable_dataset(num_shards=8)
    return {
        "files": corpus,
        "function": lambda: iter(records),
        "dataset": data,
        "iterable, few shards": few,
        "iterable, many shards": many,
        "iterable, shuffle buffer": many.shuffle(seed=1, buffer_size=50),
        "iterable, few shards, shuffle buffer": few.shuffle(seed=1, buffer_size=50),
        "mixture": Mixture([corpus, lambda: iter(records)], [2, 1]),
    }[kind]


KINDS = [
    "files",
    "function",
    "dataset",
    "iterable, few shards",
    "iterable, many shards",
    "iterable, shuffle buffer",
    "iterable, few shards, shuffle buffer",
    "mixture",
]


def stream_of(source, tokenizer_dir, **settings):
    chosen = {
        "max_length": 256,
        "pack_window": 30,
        "lanes": 4,
        "tokenizer": str(tokenizer_dir),
        **settings,
    }
    return PackedStream(
        source, config=BuildConfig.of(**chosen), order=settings.get("order", "keep")
    )


@pytest.mark.parametrize(
    ("kind", "order"),
    [*((kind, "keep") for kind in KINDS), *((kind, "shuffle") for kind in KINDS[::3])],
)
def test_resume_at_every_step(kind, order, corpus, tokenizer_dir):
    source = source_of(kind, corpus)
    straight = stream_of(source, tokenizer_dir, order=order)
    packs, states = [], [straight.state_dict()]
    for pack in straight:
        packs.append((plain(pack), pack.origin.tolist()))
        states.append(json.loads(json.dumps(straight.state_dict())))
    assert len(packs) > 40
    again = stream_of(source, tokenizer_dir, order=order)
    # The kind that is quick is resumed at more steps.
    stride = thorough(1, default=4) if kind == "files" else thorough(10, default=20)
    for step in [*range(0, len(packs), stride), len(packs) - 1]:
        again.load_state_dict(states[step])
        rest = [(plain(pack), pack.origin.tolist()) for pack in again]
        assert rest == packs[step:], f"after {step} packs"


def test_counters_are_resumed(corpus, tokenizer_dir):
    whole = stream_of(corpus, tokenizer_dir)
    assert len(list(whole)) > 0
    first, second = stream_of(corpus, tokenizer_dir), stream_of(corpus, tokenizer_dir)
    packs = iter(first)
    for _ in range(25):
        next(packs)
    second.load_state_dict(first.state_dict())
    list(second)
    assert second.counts == whole.counts
    assert second.counts["records"] == 800


def test_a_state_holds_positions_and_no_text(corpus, tokenizer_dir):
    stream = stream_of(corpus, tokenizer_dir)
    packs = iter(stream)
    for _ in range(30):
        next(packs)
    written = json.dumps(stream.state_dict())
    assert len(written) < 4000
    assert "Hello" not in written


def test_a_file_is_not_read_again_from_its_start(corpus, tokenizer_dir, monkeypatch):
    straight = stream_of(corpus, tokenizer_dir)
    packs = iter(straight)
    while straight.counts.get("lines", 0) < 600:
        next(packs)
    state = straight.state_dict()
    read = []
    locate = line_files.locate_lines
    monkeypatch.setattr(
        line_files,
        "locate_lines",
        lambda file, start, end: read.append(start) or locate(file, start, end),
    )
    again = stream_of(corpus, tokenizer_dir)
    again.load_state_dict(state)
    assert plain(next(iter(again))) == plain(next(packs))
    ahead = sum(len(lane["window"]["blocks"]) for lane in state["lanes"].values())
    assert len(read) <= ahead + 4
    assert min(read) > 0


@pytest.mark.parametrize("shards", [2, 4])
def test_a_dataset_is_not_iterated_again(shards, tokenizer_dir):
    seen = []

    def noted(row):
        seen.append(row["text"])
        return row

    data = (
        datasets.Dataset.from_list(rows("text", 4000, seed=4))
        .to_iterable_dataset(num_shards=shards)
        .map(noted)
    )
    straight = stream_of(data, tokenizer_dir)
    packs = iter(straight)
    while straight.counts.get("lines", 0) < 3600:
        next(packs)
    state, expected = straight.state_dict(), plain(next(packs))
    again = stream_of(data, tokenizer_dir)
    seen.clear()
    again.load_state_dict(state)
    assert plain(next(iter(again))) == expected
    assert 0 < len(seen) < 2000


def test_resume_in_a_second_pass(corpus, tokenizer_dir):
    straight = stream_of(corpus, tokenizer_dir, order="shuffle")
    first, second = plains(straight), []
    for pack in straight:
        second.append(plain(pack))
        if len(second) == 20:
            state = straight.state_dict()
    assert sorted(map(str, first)) != sorted(map(str, second)), "each pass packs anew"
    again = stream_of(corpus, tokenizer_dir, order="shuffle")
    again.load_state_dict(state)
    assert again.epoch == 1
    assert plains(again) == second[20:]


def test_a_state_from_the_end_of_a_pass_leaves_nothing_of_it(corpus, tokenizer_dir):
    straight, again = (
        stream_of(corpus, tokenizer_dir, order="shuffle"),
        stream_of(corpus, tokenizer_dir, order="shuffle"),
    )
    list(straight)
    again.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    assert list(again) == []
    assert again.counts == straight.counts
    assert plains(again) == plains(straight)
    assert again.epoch == straight.epoch == 1


def test_the_state_of_another_stream_is_rejected(corpus, tokenizer_dir):
    state = stream_of(corpus, tokenizer_dir).state_dict()
    for other in ({"pack_window": 31}, {"seed": 1}, {"max_length": 255}, {"lanes": 5}):
        with pytest.raises(MismatchError, match="another stream"):
            stream_of(corpus, tokenizer_dir, **other).load_state_dict(state)


def test_records_that_changed_are_noticed(tokenizer_dir):
    records = rows("text", 700, seed=3)
    first = stream_of(lambda: iter(records), tokenizer_dir)
    packs = iter(first)
    for _ in range(30):
        next(packs)
    state = first.state_dict()
    other = stream_of(lambda: iter(records[:100]), tokenizer_dir)
    state["stream"] = other.identity
    other.load_state_dict(state)
    with pytest.raises(MismatchError, match="no longer has the records"):
        list(other)


def test_invalid_states_are_rejected(corpus, tokenizer_dir):
    straight = stream_of(corpus, tokenizer_dir)
    packs = iter(straight)
    for _ in range(6):
        next(packs)
    state = json.loads(json.dumps(straight.state_dict()))
    lane = state["lanes"]["0"]
    window = lane["window"]
    assert window["blocks"]
    assert window["pool"] or window["dry"] is False

    def with_window(**changes):
        return {**state, "lanes": {"0": {**lane, "window": {**window, **changes}}}}

    mangled = [
        *(None, 7, "x", [], [None], {}, [state, {}]),
        *({name: value for name, value in state.items() if name != left_out} for left_out in state),
        *({**state, "epoch": epoch} for epoch in (None, -1, "0", True)),
        *(
            {**state, "lanes": lanes}
            for lanes in (3, None, [], {"a": lane}, {"4": lane}, {"0": None}, {"0": 7})
        ),
        *({**state, "lanes": {"0": {k: v for k, v in lane.items() if k != name}}} for name in lane),
        *({**state, "lanes": {"0": {**lane, name: "x"}}} for name in lane),
        *(
            {
                **state,
                "lanes": {"0": {**lane, "window": {k: v for k, v in window.items() if k != name}}},
            }
            for name in window
        ),
        *(
            with_window(**{name: value})
            for name in window
            if name != "next"
            for value in ("x", None, -1)
        ),
        *(with_window(blocks=blocks) for blocks in ([3], [[None]], [[None, 3]], [[None, "ä"]])),
        *(with_window(pool=pool) for pool in ([3], [[3]], [[[0]]], [[[99, 0]]], [[[0, 10**6]]])),
        with_window(counts={"lines": "x"}),
    ]
    for number, one in enumerate(mangled):
        stream = stream_of(corpus, tokenizer_dir)
        with pytest.raises(ConfigError, match="not a state of a stream") as caught:
            stream.load_state_dict(one)
        assert caught.value.remedy, number
    stream.load_state_dict(state)
    assert plain(next(iter(stream))) == plain(next(packs))
