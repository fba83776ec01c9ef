"""Streams end, whatever the sizes of their records."""

from __future__ import annotations

import itertools
import json

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sftprep import BuildConfig
from sftprep.errors import EmptyInput, MismatchError, SftprepError
from sftprep.stream import Mixture, PackedStream, backlog, open_stream
from tests.stream.plain_packs import rows
from tests.support import at_most


def test_a_large_file_of_short_records_with_default_settings(tokenizer_dir, tmp_path):
    """Blocks of 1,000 records and more, of which one is to be compared in each 1,000."""
    path = tmp_path / "short.jsonl"
    line = '{"prompt": "%07d tea or red", "completion": " red"}\n'
    with path.open("w") as file:
        file.writelines(line % k for k in range(250_000))
    assert path.stat().st_size > 12_000_000
    with at_most(60):
        first = next(iter(open_stream(str(path), tokenizer=str(tokenizer_dir), max_length=512)))
    assert len(first.seq_lengths) > 1


sizes = st.one_of(
    st.integers(2, 60), st.integers(60, 3_000), st.sampled_from([65_536, 262_145, 1_000_000])
)


def record_of(size: int, number: int) -> bytes:
    """A line of about `size` bytes: an empty object below 13, which is not a record of text."""
    if size < 13:
        return b"{}\n"
    text = (f"{number} and on " * (size // 8 + 1))[: size - 12]
    return json.dumps({"text": text}).encode() + b"\n"


@pytest.mark.slow
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    parts=st.lists(st.tuples(sizes, st.integers(1, 5_000)), min_size=1, max_size=3),
    lanes=st.sampled_from([1, 2, 16]),
    window=st.sampled_from([1, 100, 4096]),
    kind=st.sampled_from(["file", "gz", "iterable"]),
    packing=st.sampled_from(["bfd", "none"]),
)
def test_records_of_two_bytes_to_a_megabyte(
    tmp_path_factory, tokenizer_dir, parts, lanes, window, kind, packing
):
    # No more than four megabytes a stream.
    parts = [(size, max(1, min(count, 2_000_000 // size))) for size, count in parts]
    lines = [b'{"text": "the first one tells the format"}\n']
    lines += [record_of(size, k) for size, count in parts for k in range(count)]
    path = tmp_path_factory.mktemp("sizes") / "a.jsonl"
    path.write_bytes(b"".join(lines))
    source = str(path)
    if kind == "gz":
        import gzip

        source += ".gz"
        path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(path.read_bytes(), 1))
    elif kind == "iterable":
        made = [json.loads(line) for line in lines]
        source = datasets.Dataset.from_list(made).to_iterable_dataset()
    chosen = {"packing": packing} if packing == "none" else {"pack_window": window}
    config = BuildConfig.of(
        tokenizer=str(tokenizer_dir), max_length=64, lanes=lanes, on_bad_record="quarantine",
        max_rejected="100%", **chosen,
    )  # fmt: skip
    with at_most(120):
        stream = PackedStream(source, config=config)
        packs = sum(1 for _ in stream)
    counts = stream.counts
    assert packs > 0
    rejected = sum(count for name, count in counts.items() if name.startswith("rejected."))
    assert rejected == sum(line == b"{}\n" for line in lines) if kind != "iterable" else True
    assert counts["sequences"] + rejected + sum(
        count for name, count in counts.items() if name.startswith("dropped.")
    ) == len(lines)


def endless():
    """Records that a model cannot be trained on, without an end."""
    for number in itertools.count():
        yield {"text": "good"} if number == 0 else {"text": ""}


def test_an_endless_source_without_sequences_is_an_error(tokenizer_dir, monkeypatch):
    monkeypatch.setattr(backlog, "MOST_WITHOUT_SEQUENCE", 5_000)
    with (
        at_most(60),
        pytest.raises(EmptyInput, match=r"records in a row of .*endless.* gave no sequence"),
    ):
        list(open_stream(endless, tokenizer=str(tokenizer_dir), max_length=64))


def test_a_mixture_with_a_source_that_ends_at_once_ends(tokenizer_dir):
    mixture = Mixture([rows("text", 300), rows("text", 1)], [1.0, 1000.0])
    with at_most(60):
        assert list(open_stream(mixture, tokenizer=str(tokenizer_dir), max_length=64))


def test_lanes_without_a_record_give_nothing_in_any_pass(tokenizer_dir):
    """As a data set without a limit of passes."""
    stream = open_stream(rows("text", 3), tokenizer=str(tokenizer_dir), max_length=64, lanes=8)
    data = stream.to_hf(shards=8, epochs=None)
    with at_most(60):
        empty = [k for k in range(8) if not list(itertools.islice(iter(data.shard(8, k)), 1))]
    assert len(empty) == 5


def test_a_state_that_counts_more_packs_than_there_are_is_an_error(tokenizer_dir, corpus):
    stream = open_stream(
        corpus, tokenizer=str(tokenizer_dir), max_length=64, lanes=1, pack_window=20
    )
    iterator = iter(stream)
    for _ in range(30):
        next(iterator)
    state = stream.state_dict()
    state["lanes"]["0"]["taken"] = 10**15
    again = open_stream(
        corpus, tokenizer=str(tokenizer_dir), max_length=64, lanes=1, pack_window=20
    )
    again.load_state_dict(state)
    with at_most(60), pytest.raises((MismatchError, SftprepError)):
        list(again)
