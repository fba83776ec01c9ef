"""Lines read as columns are what orjson reads of them, and ordinary lines are read as columns."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftprep.lookup import Letters
from sftprep.sources.plain import Fields, Layout, PlainLines, Turns

LAYOUT = Layout(
    "messages",
    "role",
    "content",
    ("user", "assistant", "environment", "a_name_of_more_than_sixteen_letters"),
)
SHAREGPT = Layout("conversations", "from", "value", ("human", "gpt"))
LOOKED = frozenset({"tools", "prompt", "completion", "system", "chat_template_kwargs"})
MESSAGES = [
    {"role": "user", "content": 'Hi "you"\n\\ 中 \U0001f600'},
    {"role": "assistant", "content": ""},
]


def check_turns(data: bytes, turns: Turns, layout: Layout) -> None:
    lines = data.split(b"\n")
    assert turns.lines.tolist() == sorted(set(turns.lines.tolist()))
    for number, line in enumerate(turns.lines.tolist()):
        record = orjson.loads(lines[line])
        assert LOOKED.isdisjoint(record)
        first, last = turns.bounds[number : number + 2].tolist()
        read = [
            {layout.speaker: layout.names[speaker], layout.content: content}
            for speaker, content in zip(
                turns.speakers[first:last], turns.contents[first:last], strict=True
            )
        ]
        assert read == record[layout.key]
    assert len(turns.speakers) == len(turns.contents) == turns.bounds[-1]


def check_fields(data: bytes, fields: Fields, wanted: list[str]) -> None:
    lines = data.split(b"\n")
    for number, line in enumerate(fields.lines.tolist()):
        record = orjson.loads(lines[line])
        assert LOOKED.isdisjoint(record.keys() - {*wanted})
        assert {key: fields.values[key][number] for key in wanted} == {
            key: record[key] for key in wanted
        }


def check(data: bytes) -> int:
    """How many lines were read as columns, in any of the ways; each was compared."""
    try:
        lines = PlainLines(Letters(data))
    except UnicodeDecodeError:
        return 0
    found = 0
    for layout in (LAYOUT, SHAREGPT):
        turns = lines.turns(layout, LOOKED).readable()
        check_turns(data, turns, layout)
        found += len(turns.lines)
    for wanted in (["prompt", "completion"], ["text"], ["a question of many letters", "é"]):
        fields = lines.fields(wanted, LOOKED - {*wanted})
        check_fields(data, fields, wanted)
        found += len(fields.lines)
    return found


COMPACT: dict[str, Any] = {"separators": (",", ":")}
DUMPS: list[Callable[[Any], str]] = [
    json.dumps,
    lambda value: json.dumps(value, ensure_ascii=False),
    lambda value: json.dumps(value, **COMPACT),
    lambda value: json.dumps(value, ensure_ascii=False, **COMPACT),
]
ORDINARY: list[dict[str, Any]] = [
    {"messages": MESSAGES},
    {"messages": [{"content": m["content"], "role": m["role"]} for m in MESSAGES]},
    {"id": 3, "messages": MESSAGES},
    {
        "id": "x",
        "meta": {"a": [1, None, "}]"]},
        "messages": MESSAGES,
        "score": 1.5,
        "ok": True,
        "s": '\\"}]',
    },
    {
        "messages": [
            {"role": "environment", "content": "x"},
            {"role": LAYOUT.names[3], "content": "y"},
        ]
    },
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"prompt": "q\n", "completion": "\ta"},
    {"completion": "a", "source": "web", "prompt": "q"},
    {"text": "one \\ two"},
    {"é": "x", "a question of many letters": "y"},
]


@pytest.mark.parametrize("dumps", DUMPS)
@pytest.mark.parametrize("record", ORDINARY)
@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_ordinary_lines_are_read_as_columns(
    record: dict[str, Any], dumps: Callable[[Any], str], end: str
) -> None:
    if dumps in (DUMPS[0], DUMPS[2]) and "é" in record:
        return  # a key with an escape in it is left to the general way
    line = dumps(record)
    assert check((line + end).encode()) == 1
    assert check(f"\n{line}\nno json\n{line}{end}".encode()) == 2


LEFT = [
    b'{"messages": []}',
    b'{"messages": [{"role": "user", "content": "a", "weight": 0}]}',
    b'{"messages": [{"role": "user"}]}',
    b'{"messages": [{"role": "user", "role": "user"}]}',
    b'{"messages": [{"role": "nobody", "content": "a"}]}',
    b'{"messages": [{"role": "use\\u0072", "content": "a"}]}',
    b'{"messages": [{"r\\u006fle": "user", "content": "a"}]}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"messages": [{"role": "user", "content": "\\q"}]}',
    b'{"messages": [{"role": "user", "content": "a\tb"}]}',
    b'{"messages": [{"role": "user", "content": 1}]}',
    b'{"messages": [{"role": "user", "content": "a"}], "tools": []}',
    b'{"tools": 1, "messages": [{"role": "user", "content": "a"}]}',
    b'{"messages": [{"role": "user", "content": "a"}], "messages": []}',
    b'{"x": {"messages": [{"role": "user", "content": "a"}]}}',
    b'{"x": {"messages": [{"role": "user", "content": "a"}]}, "messages": []}',
    b'{"messages": [{"role": "user", "content": "a"}], "x": NaN}',
    b'{"messages": [{"role": "user", "content": "a"}]} {"a": 1}',
    b'{"messages": [{"role": "user", "content": "a"}]',
    b'{"messages": [{"role": "user", "content": "a"}]]',
    b'[{"messages": [{"role": "user", "content": "a"}]}]',
    b'{"messages": [{"role": "user", "content": "a"},]}',
    b'{"messages": [{"role": "user", "content": "a"}], }',
    b'{"messages": [{"role": "user", "content": "a"}], "x": "\\q"}',
    b'\xef\xbb\xbf{"messages": [{"role": "user", "content": "a"}]}',
    b'{"prompt": "a", "completion": null}',
    b'{"prompt": "a", "prompt": "b", "completion": "c"}',
    b'{"prompt": "a", "completion": "b", "tools": "c"}',
    b'{"prompt": "a", "completion": "b", "x": "\\q"}',
    b'{"prompt": "a", "completion": "b", "\\q": "x"}',
    b'{"prompt": "a", "completion": "\\ud800"}',
    b'{"prompt": "a" "completion": "b"}',
    b'{"prompt", "a": "completion", "b"}',
    b'"prompt": "a", "completion": "b"',
    b'{"prompt": "a", "completion": "b"}}',
    b'{"prompt": "a", "completion": "' + b"\\" * 201 + b'"}',
    b"",
    b'"',
    b"{}",
]


@pytest.mark.parametrize("line", LEFT)
def test_other_lines_are_left_alone(line: bytes) -> None:
    good = json.dumps({"messages": MESSAGES}).encode()
    assert check(line) == 0
    assert check(b"\n".join((good, line, good, b""))) == 2


texts = st.text(
    st.sampled_from('ab"\\\n\t{}[],: é中\U0001f600\x7f\u2028') | st.characters(codec="utf-8"),
    max_size=8,
)
messages = st.fixed_dictionaries({"role": st.sampled_from(LAYOUT.names), "content": texts})
extras = st.dictionaries(
    st.sampled_from(["id", "x", "tools", "text"]),
    st.integers() | texts | st.lists(texts, max_size=2),
    max_size=2,
)
records = st.tuples(extras, st.lists(messages, max_size=4), extras).map(
    lambda r: {**r[0], "messages": r[1], **r[2]}
) | (
    st.dictionaries(
        st.sampled_from(["prompt", "completion", "text", "tools", "x"]), texts, max_size=4
    )
)
lines_of = st.tuples(records, st.sampled_from(DUMPS)).map(lambda pair: pair[1](pair[0]).encode())


@settings(max_examples=300, deadline=None)
@given(st.lists(lines_of, max_size=6))
def test_random_records(lines: list[bytes]) -> None:
    check(b"\n".join(lines))


@settings(max_examples=600, deadline=None)
@given(st.lists(lines_of, min_size=1, max_size=3), st.data())
def test_damaged_lines(lines: list[bytes], data: st.DataObject) -> None:
    whole = bytearray(b"\n".join(lines))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, max(len(whole) - 1, 0)))
        byte = data.draw(st.sampled_from(b'"\\,:{}[] \nax\xc3\xff\x00'))
        how = data.draw(st.sampled_from(["insert", "replace", "delete", "double"]))
        if how == "insert":
            whole.insert(place, byte)
        elif how == "replace" and whole:
            whole[place] = byte
        elif how == "delete":
            del whole[place : place + 1]
        else:
            whole[place:place] = whole[place : place + data.draw(st.integers(1, 30))]
    check(bytes(whole))


@given(st.binary(max_size=30), st.lists(st.binary(min_size=1, max_size=4), max_size=4))
def test_looking_for_short_texts(data: bytes, words: list[bytes]) -> None:
    assert Letters(data).hold_any(words) == any(word in data for word in words)


@pytest.mark.parametrize("key", ['a": [{"role', "a\\n", 'a"b', "\udcff"])
def test_names_that_are_never_written_as_they_are(key: str) -> None:
    """Raw bytes that look like such a name are no string of that name."""
    data = (
        b'{"a": [{"role": "user", "content": "x"}]}\n{"a\\n": [{"role": "user", "content":'
        b' "x"}]}\n{"a": "b", "a\\n": "c"}\n'
    )
    layout = Layout(key, "role", "content", ("user",))
    assert len(PlainLines(Letters(data)).turns(layout, LOOKED).lines) == 0
    assert len(PlainLines(Letters(data)).fields([key], LOOKED | {key}).lines) == 0


def test_more_keys_that_matter_than_a_byte_counts() -> None:
    looked = frozenset(f"key{number:03}" for number in range(400))
    data = (
        b"".join(b'{"text": "a", "key%03d": "b"}\n' % number for number in range(0, 400, 3))
        + b'{"text": "a", "key": "b"}\n'
    )
    assert PlainLines(Letters(data)).fields(["text"], looked).lines.tolist() == [
        data.count(b"\n") - 1
    ]


def test_one_order_of_keys_in_a_conversation() -> None:
    turned = [{"content": m["content"], "role": m["role"]} for m in MESSAGES]
    assert check(json.dumps({"messages": [MESSAGES[0], turned[1]]}).encode()) == 0


short = st.text(st.sampled_from('<|/"\\a\n｜\U0001f600'), min_size=1, max_size=3)


@given(
    st.lists(st.text(st.sampled_from('<|/"\\a\n｜\U0001f600 '), max_size=8)),
    st.lists(short, max_size=3),
    st.sampled_from(DUMPS),
)
def test_what_lines_of_json_may_hold(
    texts: list[str], words: list[str], dumps: Callable[[Any], str]
) -> None:
    for written in (
        dumps(texts),
        dumps(texts).replace("/", "\\/"),
        dumps(texts).replace("<", "\\u003C").replace("a", "\\u0061"),
    ):
        held = any(word in text for text in texts for word in words)
        assert Letters(written.encode()).may_hold(words) or not held
