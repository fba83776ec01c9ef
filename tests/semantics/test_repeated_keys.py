"""Objects that have a key several times: parsers would keep the last value without a message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftprep.core.repeated_keys import count_keys, count_keys_of_lines, find_repeated_key
from sftprep.sources.readers.jsonl import parse_lines
from tests.semantics.conftest import CHATML
from tests.semantics.prepared import prepare

TURNS = '{"role":"user","content":"Hi"},{"role":"assistant","content":"Yes."}'
CALL = '{"type":"function","function":{"name":"f","arguments":%s}}'


def called(arguments: str) -> str:
    call = CALL % arguments
    return (
        '{"messages":[{"role":"user","content":"Hi"},'
        f'{{"role":"assistant","content":"","tool_calls":[{call}]}}]}}'
    )


REPEATED = [
    '{"messages":[{"role":"user","content":"Hi"},'
    '{"role":"assistant","content":"lost answer","content":"kept answer"}]}',
    f'{{"messages":[{TURNS}],"messages":[{TURNS}]}}',
    f'{{"messages" : [{TURNS}], "messages"\t  :[{TURNS}]}}',
    f'{{"messages":[{TURNS}],"m\\u0065ssages":[{TURNS}]}}',
    f'  [{TURNS[:-1]},"content":"No."}}]',
    f'[{TURNS[:-1]},"content":"No."}}]',
    f'\ufeff[{TURNS[:-1]},"content":"No."}}]',
    called('{"a":1,"a":2}'),
    called('"{\\"a\\":1,\\"a\\":2}"'),
    f'{{"messages":[{TURNS}],"tools":"[{{\\"name\\":\\"f\\",\\"name\\":\\"g\\"}}]"}}',
    json.dumps({"messages": f'[{TURNS[:-1]},"content":"No."}}]'}),
]
DISTINCT = [
    f'{{"messages":[{TURNS}]}}',
    f'[{TURNS}]',
    json.dumps({"messages": [{"role": "user", "content": '{"a": 1, "a": 2} and "b\\": c" : d'},
                             {"role": "assistant", "content": ' " : \\": '}]}),
    called('{"a":{"a":1},"b":[{"a":1},{"a":2}]}'),
    called('"{\\"a\\":1,\\"b\\":{\\"a\\":2}}"'),
]  # fmt: skip


@pytest.fixture
def folder(folder_with: Any) -> Path:
    shows = "{% for m in messages %}{{ m.role }}{{ m.content }}{% for c in m.tool_calls or [] %}"
    return folder_with(
        shows + "{{ c.function.name }}{{ c.function.arguments }}{% endfor %}{% endfor %}"
    )


@pytest.mark.parametrize("line", REPEATED)
@pytest.mark.parametrize("transform", [None, lambda record: record])
def test_a_record_with_a_repeated_key_is_rejected(line: str, transform: Any, folder: Path) -> None:
    batch = prepare([line], folder, transform=transform).batch
    assert [record.reason for record in batch.rejected] == ["repeated_key"]
    assert "several times" in batch.rejected[0].message
    assert len(batch.lengths) == 0


@pytest.mark.parametrize("line", DISTINCT)
def test_a_record_without_a_repeated_key_is_read(line: str, folder: Path) -> None:
    assert prepare([line], folder).batch.rejected == []


def test_the_message_names_the_key(folder_with: Any) -> None:
    lines = [DISTINCT[0], REPEATED[0], DISTINCT[0], '{"text":"a","text":"b"}']
    batch = prepare(lines, folder_with(CHATML)).batch
    assert [(record.line, "'content'" in record.message) for record in batch.rejected] == [
        (1, True),
        (3, False),
    ]


def objects(inner: Any) -> Any:
    """Return objects as lists of pairs, some with a repeated key."""
    return st.lists(st.tuples(keys, inner), max_size=3).map(Pairs)


class Pairs(tuple):  # type: ignore[type-arg]
    """An object that may have a key several times."""


keys = st.sampled_from(["a", "b", 'q"', "back\\", ":", '":', ' "', ""])
texts = keys | st.text(max_size=6)
values = st.recursive(
    texts | st.integers(), lambda inner: st.lists(inner, max_size=3) | objects(inner), max_leaves=8
)


def dump(value: Any, space: str) -> str:
    if isinstance(value, Pairs):
        members = (f"{json.dumps(k)}{space}:{dump(v, space)}" for k, v in value)
        return "{" + ",".join(members) + "}"
    if isinstance(value, list):
        return "[" + ",".join(dump(item, space) for item in value) + "]"
    return json.dumps(value)


def repeats(value: Any) -> bool:
    if isinstance(value, Pairs):
        names = [key for key, _ in value]
        return len({*names}) < len(names) or any(repeats(item) for _, item in value)
    return isinstance(value, list) and any(map(repeats, value))


spaces = st.sampled_from(["", " ", "\t", "  "])


@given(st.lists(objects(values), max_size=4), spaces)
def test_repeated_keys_are_found_in_any_text(records: list[Any], space: str) -> None:
    lines = [dump(record, space) for record in records]
    counts = count_keys_of_lines("\n".join(lines).encode(), [line.encode() for line in lines])
    assert len(counts) == len(lines)
    for record, line, number in zip(records, lines, counts, strict=True):
        parsed = orjson.loads(line)
        assert number >= count_keys(parsed) + repeats(record)
        assert (find_repeated_key(line, parsed) is not None) == repeats(record)
        assert (find_repeated_key(line, parsed, number) is not None) == repeats(record)


@given(
    st.lists(
        st.tuples(objects(values) | st.lists(objects(values), min_size=1, max_size=2), spaces),
        max_size=6,
    ),
    st.integers(0, 200),
)
def test_lines_with_repeated_keys_are_found_among_other_lines(
    records: list[tuple[Any, str]], number_before: int
) -> None:
    usual = [f'{{"messages":[{TURNS}],"source":"a: \\" :b"}}'] * number_before
    lines = [*usual, *(dump(record, space) for record, space in records), "", "{"]
    data = "\n".join(lines).encode()
    found = [key is not None for _, _, _, key in parse_lines(data, data.split(b"\n"))]
    assert found == [
        *([False] * number_before),
        *(repeats(record) for record, _ in records),
        False,
        False,
    ]


def test_a_key_before_a_space_does_not_hide_a_repeated_key(folder_with: Any) -> None:
    line = f'{{"messages" :[{TURNS}],"id":"a","id":"b"}}'
    batch = prepare([line], folder_with(CHATML)).batch
    assert [record.reason for record in batch.rejected] == ["repeated_key"]
