"""Faults of a running stream: sources that raise, bad records, changed files, empty sources."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.request import urlopen

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftprep import BuildConfig
from sftprep.errors import (
    ConfigError,
    EmptyInput,
    InputChanged,
    InputUnreadable,
    RecordError,
    SourceError,
    TooManyRejected,
)
from sftprep.stream import Mixture, PackedStream, open_stream
from sftprep.stream.sources import line_files
from tests.stream.plain_packs import plains, rows


def stream_of(source, tokenizer_dir, retries=4, **settings):
    chosen = {
        "max_length": 256,
        "pack_window": 30,
        "lanes": 4,
        "tokenizer": str(tokenizer_dir),
        **settings,
    }
    return PackedStream(source, config=BuildConfig.of(**chosen), retries=retries, retry_wait=0.0)


class Cut:
    """Records of a connection that is cut after the given numbers of records, one per opening."""

    def __init__(self, records, after):
        self.records, self.after, self.opened = records, after, 0

    def __call__(self) -> Iterator[dict]:
        self.opened += 1
        yield from (
            self.records[: self.after[self.opened - 1]]
            if self.opened <= len(self.after)
            else self.records
        )
        if self.opened <= len(self.after):
            raise ConnectionResetError("cut")


@pytest.mark.parametrize("order", ["keep", "shuffle"])
def test_a_source_that_raises_is_read_again_without_loss_or_repeat(order, tokenizer_dir):
    records = rows("text", 500)
    settings = {"window": 30, "lanes": 4, "order": order, "retry_wait": 0.0}
    whole = plains(PackedStream(lambda: iter(records), str(tokenizer_dir), **settings))
    cut = Cut(
        records, [0, 100, 0, 17, 201, 200, 333, 499]
    )  # the first two are for a look at the first records
    assert plains(PackedStream(cut, str(tokenizer_dir), **settings)) == whole
    assert cut.opened == 9


def test_a_stream_resumes_when_it_is_iterated_after_an_error(tokenizer_dir):
    records = rows("text", 500)
    whole = plains(stream_of(lambda: iter(records), tokenizer_dir))
    stream = stream_of(Cut(records, [100, 300, 450]), tokenizer_dir, retries=0)
    packs = []
    for _ in range(3):
        try:
            for one in stream:
                packs.append(one)
            break
        except SourceError:
            continue
    assert plains(packs) == whole


@pytest.mark.parametrize("fails_at", [0, 1, 60, 64, 65, 128, 256, 300])
@pytest.mark.parametrize("lanes", [1, 4])
def test_a_source_that_raises_and_then_ends_early_is_an_error(fails_at, lanes, tokenizer_dir):
    opened = []

    def once():
        opened.append(1)
        yield from (rows("text", 500) if len(opened) == 1 else shared)  # first: to find the format

    def broken():
        yield from rows("text", fails_at)
        raise ConnectionResetError("cut")

    shared = broken()
    with pytest.raises(SourceError, match="ended early") as caught:
        list(stream_of(once, tokenizer_dir, lanes=lanes))
    assert isinstance(caught.value.__cause__, ConnectionResetError)


@pytest.mark.parametrize("fails_at", [2, 64, 65, 100])
@pytest.mark.parametrize("is_exact", [True, False])
def test_shards_that_raise_and_then_end_early_are_an_error(fails_at, is_exact, tokenizer_dir):
    limits = [200]

    def cut(shards):
        for shard in shards:
            limit = limits.pop() if len(limits) > 1 and shard else limits[0]
            for number in range(limit):
                yield {"text": f"shard {shard} row {number}"}
            if limit == fails_at:
                raise ConnectionResetError("cut")

    data = datasets.IterableDataset.from_generator(cut, gen_kwargs={"shards": [0, 1]})
    data = data if is_exact else data.shuffle(seed=1, buffer_size=1)
    stream = stream_of(data, tokenizer_dir, lanes=2)
    limits[:] = [fails_at - 2, fails_at]
    with pytest.raises(SourceError, match="ended early"):
        list(stream)


class Server(BaseHTTPRequestHandler):
    """Serves the records of a file, and cuts each third connection in the middle."""

    lines: tuple[bytes, ...] = ()
    requests = 0

    def do_GET(self):
        Server.requests += 1
        body = b"".join(self.lines)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if Server.requests % 3 == 0 else body)
        self.close_connection = True

    def log_message(self, *_):
        pass


def test_a_network_that_is_cut(tokenizer_dir):
    Server.lines = tuple(json.dumps(row).encode() + b"\n" for row in rows("text", 400))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/data"

    def fetched(shards):
        # One request a shard of the data set, as `datasets` streams files of the Hub.
        for shard in shards:
            with urlopen(url) as reply:
                body = reply.read()  # raises where the body is cut short
            for number, line in enumerate(body.splitlines()):
                if number % 4 == shard:
                    yield json.loads(line)

    data = datasets.IterableDataset.from_generator(fetched, gen_kwargs={"shards": [0, 1, 2, 3]})
    try:
        found = stream_of(data, tokenizer_dir)
        packs = list(found)
    finally:
        server.shutdown()
    origins = sorted(int(origin) for pack in packs for origin in pack.origin)
    assert len(origins) == len(set(origins)) == 400
    assert found.counts["records"] == 400
    assert Server.requests > 5


def test_a_source_that_always_raises_is_an_error_after_the_retries(tokenizer_dir):
    def broken():
        yield from rows("text", 150)
        raise ValueError("no more")

    with pytest.raises(
        SourceError,
        match=(
            r"broken \(lane \d of the stream\) cannot be read; tried 3 times .*ValueError: no more"
        ),
    ) as caught:
        list(stream_of(broken, tokenizer_dir, retries=2))
    assert isinstance(caught.value.__cause__, ValueError)
    assert "larger retries" in caught.value.remedy
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), SourceError)


def test_the_source_that_raises_is_named_among_others(tokenizer_dir, corpus):
    def broken():
        yield from rows("text", 150)
        raise ValueError("no more")

    nested = Mixture([corpus, Mixture([rows("text", 90), broken], [1, 1])], [1, 1])
    with pytest.raises(
        SourceError,
        match=(
            r"broken \(lane \d of the stream\) cannot be read; tried once, and it raised ValueError"
        ),
    ):
        list(stream_of(nested, tokenizer_dir, retries=0))
    empty = Cut(rows("text", 9), [0] * 9)
    with pytest.raises(
        SourceError,
        match=r"the start of the source cannot be read; tried 5 times .*ConnectionResetError: cut",
    ):
        stream_of(empty, tokenizer_dir)
    assert empty.opened == 5


def test_a_mistake_in_the_code_of_a_source_is_not_retried(tokenizer_dir):
    opened = []

    def wrong():
        opened.append(1)
        yield from rows("text", 150)
        yield None + 1

    with pytest.raises(TypeError):
        list(stream_of(wrong, tokenizer_dir))
    assert len(opened) == 2


LINES = [json.dumps(row) for row in rows("text", 200)]
BAD = "\n".join([*LINES[:150], '{"text": 7}', *LINES[150:], "{bad"]) + "\n"


def test_the_first_bad_record_stops_the_stream_and_is_located(tokenizer_dir, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(BAD)
    with pytest.raises(RecordError) as caught:
        list(stream_of(str(path), tokenizer_dir, lanes=1))
    assert str(path) in str(caught.value)
    assert caught.value.line == 151
    with pytest.raises(RecordError) as caught:
        list(stream_of(lambda: [{"text": "a"}] * 90 + [{"text": None}], tokenizer_dir))
    assert caught.value.line == 91


def test_bad_records_are_quarantined_up_to_a_limit(tokenizer_dir, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(BAD)
    stream = stream_of(str(path), tokenizer_dir, on_bad_record="quarantine")
    packs = list(stream)
    assert sum(len(p.seq_lengths) for p in packs) == 200
    assert [(line, bad.reason) for _, line, bad in sorted(stream.rejected, key=lambda r: r[1])] == [
        (151, "bad_type"),
        (202, "bad_json"),
    ]
    assert stream.counts["rejected.bad_type"] == 1
    for limit in ("1", "0.5%"):
        with pytest.raises(TooManyRejected, match=r"2 of 2\d\d records|1 of"):
            list(
                stream_of(str(path), tokenizer_dir, on_bad_record="quarantine", max_rejected=limit)
            )


def test_a_file_that_grew_is_noticed(tokenizer_dir, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(LINES) + "\n")
    stream = stream_of(str(path), tokenizer_dir)
    with open(path, "a") as file:
        file.write(LINES[0] + "\n")
    with pytest.raises(InputChanged):
        list(stream)


def test_a_file_that_was_removed_is_named(tokenizer_dir, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(LINES) + "\n")
    stream = stream_of(str(path), tokenizer_dir)
    path.unlink()
    with pytest.raises(InputUnreadable, match=f"cannot read {path}"):
        list(stream)


def test_a_source_without_records_is_an_error(tokenizer_dir, tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text("\n\n")
    with pytest.raises(EmptyInput, match="no sequence"):
        list(stream_of(str(path), tokenizer_dir))


def test_unsupported_sources_are_rejected(tokenizer_dir):
    for source in (iter(rows("text", 3)), 7, {"text": ["a"]}):
        with pytest.raises(ConfigError, match="cannot be created from"):
            stream_of(source, tokenizer_dir)
    only = iter(rows("text", 3))
    with pytest.raises(ConfigError, match="returns the same iterator each time"):
        stream_of(lambda: only, tokenizer_dir)
    assert len(list(only)) == 3
    with pytest.raises(ConfigError, match='packing="wrapped" is not supported by streams'):
        PackedStream(
            lambda: iter(rows("text", 3)),
            config=BuildConfig.of(packing="wrapped", tokenizer=str(tokenizer_dir)),
        )
    with pytest.raises(ConfigError, match="did you mean"):
        open_stream(lambda: iter(rows("text", 3)), tokenizer=str(tokenizer_dir), max_lengt=7)


def test_one_sequence_a_pack_in_order(tokenizer_dir):
    records = rows("text", 150)
    stream = open_stream(
        lambda: iter(records), tokenizer=str(tokenizer_dir), packing="none", lanes=1
    )
    packs = list(stream)
    assert [int(p.origin[0]) for p in packs] == list(range(150))
    assert {len(p.seq_lengths) for p in packs} == {1}
    again = open_stream(
        lambda: iter(records), tokenizer=str(tokenizer_dir), packing="none", lanes=1
    )
    half = iter(again)
    for _ in range(70):
        next(half)
    last = open_stream(lambda: iter(records), tokenizer=str(tokenizer_dir), packing="none", lanes=1)
    last.load_state_dict(json.loads(json.dumps(again.state_dict())))
    assert plains(last) == plains(packs[70:])


@pytest.mark.parametrize("mode", ["error", "quarantine"])
@pytest.mark.parametrize("whole_line", [True, False])
@pytest.mark.parametrize("name", ["data.jsonl", "data.csv"])
def test_a_file_that_is_cut_short_within_a_pass_is_an_error(
    tokenizer_dir, tmp_path, mode, whole_line, name
):
    path = tmp_path / name
    start = "text\n" if name == "data.csv" else ""
    lines = [f"record {k} with some words in it" for k in range(60_000)]
    if name == "data.jsonl":
        lines = [json.dumps({"text": line}) for line in lines]
    content = start + "\n".join(lines) + "\n"
    path.write_text(content)
    stream = stream_of(str(path), tokenizer_dir, on_bad_record=mode, max_rejected="100%")
    packs = iter(stream)
    next(packs)
    os.truncate(path, content.rfind("\n", 0, len(content) // 2) + (1 if whole_line else -7))
    with pytest.raises(InputChanged, match=f"{name} became shorter"):
        list(packs)


def test_a_file_that_loses_the_end_of_the_last_line_of_a_block_is_an_error(tokenizer_dir, tmp_path):
    """The line starts in the last complete block, and ends after it."""
    path = tmp_path / "data.jsonl"
    path.write_text((json.dumps({"text": "word " * 20}) + "\n") * 1000)
    stream = stream_of(str(path), tokenizer_dir, lanes=1)
    block = stream.source.block
    packs = iter(stream)
    next(packs)
    os.truncate(path, (os.path.getsize(path) // block - 1) * block + 3)
    with pytest.raises(InputChanged, match="became shorter"):
        list(packs)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet", "a.arrow"])
def test_a_file_that_is_replaced_by_a_pipe_does_not_hang(tokenizer_dir, tmp_path, name):
    path = tmp_path / name
    table = pa.table({"text": [f"record {k} with some words" for k in range(20_000)]})
    if name == "a.parquet":
        pq.write_table(table, path, row_group_size=1000)
    elif name == "a.arrow":
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=1000)
    else:
        opened = gzip.open if name.endswith("gz") else open
        with opened(path, "wt") as file:
            file.writelines(
                f"{row['text'] if name == 'a.csv' else json.dumps(row)}\n"
                for row in [{"text": "text"}, *table.to_pylist()]
            )
    stream = stream_of(str(path), tokenizer_dir)
    next(iter(stream))
    stream = stream_of(str(path), tokenizer_dir)
    os.unlink(path)
    os.mkfifo(path)
    with pytest.raises((InputUnreadable, InputChanged), match=name.replace(".", r"\.")):
        next(iter(stream))


class LastPieceOnly(io.FileIO):
    """A file of which no more than a piece at a late position can be read."""

    def read(self, size=-1):
        assert 0 <= size <= 1 << 16 < self.tell()
        return super().read(size)


def test_locating_does_not_read_a_file_from_its_start(tokenizer_dir, tmp_path, monkeypatch):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f'{{"text": "number {k}"}}\n' for k in range(30_000)))
    stream = stream_of(str(path), tokenizer_dir)
    origins = sorted(int(origin) for pack_ in stream for origin in pack_.origin)
    assert [stream.locate(origin)[1] for origin in reversed(origins)] == list(range(30_000, 0, -1))
    monkeypatch.setattr(line_files, "open_regular", LastPieceOnly)
    assert stream.locate(origins[-1]) == (str(path), 30_000)


@pytest.mark.parametrize(("number", "is_read_whole"), [(40, True), (2000, False)])
def test_a_length_that_cuts_much_is_logged_once(
    number, is_read_whole, tokenizer_dir, tmp_path, caplog
):
    path = tmp_path / "long.jsonl"
    rows_of_file = [{"text": "a b c d " * 10}] * number
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of_file))
    stream = stream_of(path, tokenizer_dir, max_length=8, lanes=1)
    for _ in range(2 if is_read_whole else 1):
        for _pack in stream:
            if not is_read_whole and stream.counts["records"] >= 1000:
                break
    logged = [r.getMessage() for r in caplog.records if "max_length" in r.getMessage()]
    assert len(logged) == 1
    if not is_read_whole:
        return
    counts = stream.counts
    share, trained_share = (
        1000 * counts[f"{kind}_truncated"] // counts[f"{kind}_in"] / 10
        for kind in ("tokens", "trained")
    )
    assert logged == [
        f"max_length=8 removed {share} % of all tokens and {trained_share} % of the trained tokens;"
        " raise max_length"
    ]


def test_a_length_that_cuts_little_is_not_logged(tokenizer_dir, tmp_path, caplog):
    path = tmp_path / "short.jsonl"
    path.write_text(json.dumps({"text": "a b c d"}) + "\n")
    assert len([*stream_of(path, tokenizer_dir, lanes=1)]) == 1
    assert not [r for r in caplog.records if "max_length" in r.getMessage()]
