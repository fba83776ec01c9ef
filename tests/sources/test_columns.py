"""Only the columns of a table that a format reads are read, with the same result."""

from __future__ import annotations

import dataclasses
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftprep import build
from sftprep.records.formats import FORMATS, keys_read, read_record
from sftprep.records.options import RecordOptions
from sftprep.sources.partition import cut, read_partition, source_of
from sftprep.sources.readers.jsonl import split_lines
from tests.pipeline.builds import texts

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SAMPLES = {
    "prompt-completion": [
        {"prompt": "p", "completion": "c"},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
    ],
    "messages": [{"messages": TURNS}],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    ],
    "alpaca": [{"instruction": "i", "output": "o"}],
    "text": [{"text": "t"}],
    "tokens": [{"input_ids": [1, 2, 3]}],
}
OPTIONAL = {
    "tools": "[]",
    "chat_template_kwargs": None,
    "system": "s",
    "input": "i",
    "history": [["q", "a"]],
    "labels": [1, 2, 3],
    "completion_mask": [1, 1, 1],
    "assistant_masks": [1, 1, 1],
    "position_ids": [0, 1, 2],
    "seq_lengths": [3],
}


class Spy(dict):
    """A record that remembers which keys were read."""

    def __init__(self, record):
        super().__init__(record)
        self.keys_read = set()

    def __getitem__(self, key):
        self.keys_read.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.keys_read.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.keys_read.add(key)
        return super().__contains__(key)


@pytest.mark.parametrize("name", FORMATS)
def test_no_format_reads_a_key_outside_of_keys_read(name):
    for record in SAMPLES.get(name) or [dict.fromkeys(FORMATS[name].keys, TURNS)]:
        for more in ({}, OPTIONAL):
            for chat in (True, False):
                spy = Spy({**more, **record})
                options = RecordOptions(text_field="text", chat=chat)
                read_record(spy, 0, name, options)
                assert spy.keys_read <= keys_read(options)


def test_renamed_keys_and_the_text_field_are_read():
    options = RecordOptions((("question", "prompt"),), text_field="body")
    assert {"question", "body", "messages", "tools"} <= keys_read(options)


@pytest.mark.parametrize("kind", ["a.parquet", "a.arrow"])
def test_only_columns_that_a_format_reads_are_read(tmp_path, tokenizer_dir, kind):
    rows = [
        {"messages": TURNS, "tools": None, "vector": [0.5] * 8, "note": f"{k}"} for k in range(30)
    ]
    table = pa.Table.from_pylist(rows).append_column("blob", pa.array([b"x"] * 30))
    path = str(tmp_path / kind)
    if kind == "a.parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    source = dataclasses.replace(source_of(path), columns=keys_read(RecordOptions()))
    (part,) = cut([source])
    assert [json.loads(line) for line in split_lines(read_partition(part))] == [
        {"messages": TURNS, "tools": None}
    ] * 30
    nothing = dataclasses.replace(source, columns=frozenset({"other"}))
    assert [json.loads(line) for line in split_lines(read_partition(next(cut([nothing]))))] == [
        {}
    ] * 30
    report = build(path, tokenizer=tokenizer_dir, output=tmp_path / "o")
    assert texts(report.folder) == texts(
        build(rows, tokenizer=tokenizer_dir, output=tmp_path / "p").folder
    )
    # Text in a column of another name is read.
    named = build(
        path, tokenizer=tokenizer_dir, output=tmp_path / "n", format="text", text_field="note"
    )
    assert named.manifest.accounting.sequences == 30
