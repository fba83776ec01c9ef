"""The records that are queued for other lanes are bounded, and reading ahead changes no pack."""

from __future__ import annotations

import gzip
import itertools
import json
import subprocess
import sys
from unittest import mock

import pytest

from sftprep.errors import EmptyInput
from sftprep.stream import Mixture, backlog, open_stream
from sftprep.stream.sources import sequential
from sftprep.stream.sources.sequential import _RowReader
from tests.stream.plain_packs import plain, plains, rows

LANES = 4


@pytest.fixture
def most_queued(monkeypatch):
    """The largest `queued` of any reader, in a list of one number."""
    largest = [0]
    advance = _RowReader._advance

    def measured(reader: _RowReader) -> None:
        advance(reader)
        largest[0] = max(largest[0], reader.queued)

    monkeypatch.setattr(_RowReader, "_advance", measured)
    return largest


def small_limits(monkeypatch):
    """Lower the limits so that one block per lane is enough to make lanes read ahead."""
    monkeypatch.setattr(backlog, "READ_AHEAD_FROM", 20_000)
    monkeypatch.setattr(backlog, "MOST_QUEUED", 200_000)


def stream_of(source, tokenizer_dir, **settings):
    chosen = {"max_length": 64, "lanes": LANES, "pack_window": 200, **settings}
    return open_stream(source, tokenizer=str(tokenizer_dir), **chosen)


def without_text(count):
    return itertools.repeat({"text": ""}, count)


def test_records_without_a_sequence_are_not_queued(tokenizer_dir, monkeypatch, most_queued):
    """An example is a source with very many of them before the first usable one."""
    small_limits(monkeypatch)
    good = rows("text", 40)
    stream = stream_of(lambda: itertools.chain(without_text(30_000), good), tokenizer_dir)
    assert plains(stream)
    assert stream.counts["sequences"] == 40
    assert stream.counts["records"] == 30_040
    assert most_queued[0] < 60_000


def test_an_endless_source_without_a_sequence_is_an_error(tokenizer_dir, monkeypatch, most_queued):
    small_limits(monkeypatch)
    monkeypatch.setattr(backlog, "MOST_WITHOUT_SEQUENCE", 50_000)

    def long_prompts():
        for number in itertools.count():
            yield {"prompt": "so it goes " * 30, "completion": str(number)}

    with pytest.raises(EmptyInput, match=r"50,[0-9]{3} records in a row of .* gave no sequence"):
        next(iter(stream_of(long_prompts, tokenizer_dir, max_length=16)))
    assert most_queued[0] < 400_000


def test_a_lane_that_starves_is_an_error_before_the_queues_are_large(
    tokenizer_dir, monkeypatch, most_queued
):
    small_limits(monkeypatch)

    def every_fourth_is_empty():
        for number in itertools.count():
            yield {"text": "" if number % LANES == 1 else f"record {number}"}

    stream = stream_of(every_fourth_is_empty, tokenizer_dir)
    with pytest.raises(EmptyInput, match=r"lane 1 of .*every_fourth_is_empty got 0 seq") as raised:
        list(stream)
    assert "lanes=1" in raised.value.remedy
    assert most_queued[0] < 250_000


@pytest.mark.parametrize("order", ["keep", "shuffle"])
@pytest.mark.parametrize("kind", ["function", "gz", "mixture"])
def test_reading_ahead_changes_no_pack(kind, order, tokenizer_dir, tmp_path, monkeypatch):
    texts = rows("text", 3_000)
    for number in range(0, 3_000, 3):
        texts[number] = {"text": ""}
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in texts).encode()))
    source = {
        "function": lambda: iter(texts),
        "gz": str(path),
        "mixture": Mixture([lambda: iter(texts), str(path)], [2.0, 1.0]),
    }[kind]
    expected = plains(stream_of(source, tokenizer_dir, order=order))
    monkeypatch.setattr(backlog, "READ_AHEAD_FROM", 0)
    with mock.patch.object(
        backlog.Lane, "read_ahead", autospec=True, side_effect=backlog.Lane.read_ahead
    ) as read_ahead:
        stream = stream_of(source, tokenizer_dir, order=order)
        assert plains(stream) == expected
        assert read_ahead.called
    for taken in (1, len(expected) // 2, len(expected) - 2):
        stream = stream_of(source, tokenizer_dir, order=order)
        packs = iter(stream)
        head = [plain(next(packs)) for _ in range(taken)]
        state = json.loads(json.dumps(stream.state_dict()))
        again = stream_of(source, tokenizer_dir, order=order)
        again.load_state_dict(state)
        assert head + plains(again) == expected


LARGE_RECORDS = """
import itertools, resource, sys
from sftprep.stream import open_stream

kind, tokenizer = sys.argv[1:]


def source():
    for number in itertools.count():
        size = 500_000 if kind == "all" else 3_000_000 if number % 16 == 1 else 10
        yield {"text": f"a b c {number}", "p": "y" * size}


def stream():
    return open_stream(source, tokenizer=tokenizer, max_length=64, pack_window=64)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


first = stream()
before = peak()
packs = iter(first)
next(packs), next(packs)
state = first.state_dict()
expected = next(packs).input_ids.tolist()
del first, packs
if kind == "all":
    again = stream()
    again.load_state_dict(state)
    assert next(iter(again)).input_ids.tolist() == expected
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["all", "one lane"])
def test_large_records_do_not_fill_the_memory(kind, tokenizer_dir):
    """A window of 64 in each of 16 lanes is 500 MB of these records, and 192 MB in one lane."""
    command = [sys.executable, "-c", LARGE_RECORDS, kind, str(tokenizer_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) < 350  # MiB


def test_large_records_without_a_sequence_are_an_error(tokenizer_dir, monkeypatch):
    monkeypatch.setattr(backlog, "MOST_BYTES_WITHOUT_SEQUENCE", 20 << 20)

    def numbers():
        while True:
            yield {"text": 5, "p": "y" * 500_000}

    settings = {"on_bad_record": "quarantine", "max_rejected": "100%"}
    stream = stream_of(numbers, tokenizer_dir, **settings)
    with pytest.raises(EmptyInput, match=r"\(2[0-9] MiB\) gave no sequence"):
        next(iter(stream))


def test_blocks_that_end_by_their_bytes_change_no_pack(tokenizer_dir, monkeypatch):
    texts = rows("text", 1_000)
    expected = plains(stream_of(lambda: iter(texts), tokenizer_dir, order="shuffle"))
    for size in (1, 500, 3_000):
        monkeypatch.setattr(sequential, "BLOCK_BYTES", size)
        monkeypatch.setattr(backlog, "READ_AHEAD_FROM", size)
        stream = stream_of(lambda: iter(texts), tokenizer_dir, order="shuffle")
        packs = iter(stream)
        head = [plain(next(packs)) for _ in range(len(expected) // 3)]
        again = stream_of(lambda: iter(texts), tokenizer_dir, order="shuffle")
        again.load_state_dict(json.loads(json.dumps(stream.state_dict())))
        assert head + plains(again) == expected
