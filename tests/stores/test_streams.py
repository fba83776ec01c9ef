"""Streams of objects in a store: the packs of local files, resumed exactly, and changes refused."""

from __future__ import annotations

import gzip
import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftprep import BuildConfig
from sftprep.errors import InputChanged, InputNotFound, MismatchError, SourceError, StorageError
from sftprep.stores.folder import StoreFolder
from sftprep.stream import PackedStream
from tests.stores.builds import example_lines, put_object
from tests.stream.plain_packs import plain, plains
from tests.support import thorough


def stream_of(source, tokenizer_dir, **settings):
    config = BuildConfig.of(
        **{"max_length": 256, "pack_window": 8, "lanes": 3, "tokenizer": str(tokenizer_dir)}
        | settings
    )
    return PackedStream(source, config=config, retries=2, retry_wait=0.0)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two plain files, and one of each kind that is read from its start."""
    folder = tmp_path_factory.mktemp("in")
    rows = [json.loads(line) for line in example_lines(36, 46).splitlines()]
    (folder / "a.jsonl").write_bytes(example_lines(0, 14))
    (folder / "b.jsonl").write_bytes(example_lines(14, 24)[:-1])
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(example_lines(24, 30)))
    array = [json.loads(line) for line in example_lines(30, 36).splitlines()]
    (folder / "d.json").write_text(json.dumps(array))
    pq.write_table(pa.Table.from_pylist(rows), folder / "e.parquet", row_group_size=3)
    return folder


def test_a_stream_of_objects_has_the_packs_of_local_files(store, files, tokenizer_dir):
    store.put((path, path.name) for path in files.iterdir())
    local, remote = (stream_of(source, tokenizer_dir) for source in (str(files), str(store)))
    expected, found = list(local), list(remote)
    assert len(found) > 10
    assert [*map(plain, found)] == [*map(plain, expected)]
    origins = [int(origin) for pack in expected for origin in pack.origin]
    assert [remote.locate(each) for each in origins] == [
        (name.replace(str(files), str(store)), line) for name, line in map(local.locate, origins)
    ]
    assert plains(remote) == plains(local)  # the next pass


def test_a_stream_of_objects_is_resumed_exactly(memory, files, tokenizer_dir):
    memory.put((path, path.name) for path in files.iterdir())
    straight = stream_of(str(memory), tokenizer_dir)
    packs, states = [], [straight.state_dict()]
    for pack in straight:
        packs.append(plain(pack))
        states.append(json.loads(json.dumps(straight.state_dict())))
    again = pickle.loads(pickle.dumps(stream_of(str(memory), tokenizer_dir)))
    for number in range(0, len(packs), thorough(1, default=3)):
        again.load_state_dict(states[number])
        assert plains(again) == packs[number:]


@pytest.mark.parametrize("name", ["a.jsonl", "c.jsonl.gz", "e.parquet"])
def test_an_object_that_was_replaced_is_refused(store, files, tmp_path, tokenizer_dir, name):
    """Its size stays, and only its tag is another one."""
    content = (files / name).read_bytes()
    url = put_object(store, name, content, tmp_path)
    stream = stream_of(url, tokenizer_dir)
    first = next(iter(stream))
    state = stream.state_dict()
    same = stream_of(url, tokenizer_dir)
    same.load_state_dict(state)
    assert len(first.input_ids)
    put_object(store, name, content[:-12] + b"?" + content[-11:], tmp_path)
    restarted = pickle.loads(pickle.dumps(stream))
    for each in (restarted, same):
        with pytest.raises(InputChanged, match="was replaced after the stream was created"):
            list(each)
    if name == "a.jsonl":  # the others cannot be parsed any more
        with pytest.raises(MismatchError, match="another stream"):
            stream_of(url, tokenizer_dir).load_state_dict(state)
    store.remove([name])
    with pytest.raises(InputChanged, match="was removed"):
        list(pickle.loads(pickle.dumps(stream)))
    with pytest.raises(InputNotFound):
        stream_of(url, tokenizer_dir)


def test_a_read_that_fails_is_tried_again(memory, files, tmp_path, tokenizer_dir, monkeypatch):
    url = put_object(memory, "a.jsonl", (files / "a.jsonl").read_bytes(), tmp_path)
    stream, left = stream_of(url, tokenizer_dir), [2]
    read_range = StoreFolder.read_range

    def failing(self, *arguments):
        left[0] -= 1
        if left[0] >= 0:
            raise StorageError("the connection was reset", remedy="")
        return read_range(self, *arguments)

    local = stream_of(str(files / "a.jsonl"), tokenizer_dir)
    monkeypatch.setattr(StoreFolder, "read_range", failing)
    assert plains(stream) == plains(local)
    left[0] = 3
    with pytest.raises(SourceError, match=r"a\.jsonl .* tried 3 times"):
        list(stream)
    assert plains(stream) == plains(local)
