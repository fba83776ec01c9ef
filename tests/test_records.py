"""Each format is read as it is usually written, and other records are rejected with a reason."""

from __future__ import annotations

import contextlib
import copy
import json
from typing import Any

import pytest

from sftprep.records.formats import FORMATS, detect_format, read_record
from sftprep.records.options import InvalidRecord, RecordOptions
from sftprep.sources.readers.jsonl import excerpt

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SHAREGPT = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
ALPACA = {"instruction": "do", "input": "this", "output": "done"}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"text": "a"}, "text"),
        ({"messages": CHAT}, "messages"),
        ({"prompt": "a", "completion": "b"}, "prompt-completion"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "prompt-completion"),
        ({"prompt": "the same words again", "messages": CHAT}, "messages"),
        ({"prompt": "a", "completion": "b", "messages": CHAT}, "prompt-completion"),
        (SHAREGPT, "sharegpt"),
        (ALPACA, "alpaca"),
        ({"input_ids": [1], "labels": [1], "text": "a"}, "tokens"),
        ({"question": "a", "answer": "b"}, "question/answer"),
        ({"question": "a", "answer": 3}, None),
        ({"question": "a", "answer": "b", "text": "c"}, "text"),
        ({"question": "a", "solution": "b", "answer": "c"}, "question/solution"),
        ({"messages": None, **SHAREGPT}, "sharegpt"),
        ({"conversation": CHAT}, "conversation"),
        ({"conversation": "A: hello"}, None),
        ({}, None),
    ],
)
def test_a_format_is_detected_from_keys(record, expected):
    assert detect_format(record, RecordOptions()) == expected


def test_keys_are_renamed_before_the_format_is_read():
    options = RecordOptions(renames=(("question", "prompt"), ("answer", "completion")))
    record = {"question": "a", "answer": "b", "prompt": "another", "id": 1}
    assert detect_format(record, options) == "prompt-completion"
    example = read_record(record, 3, "prompt-completion", options)
    assert (example.prompt, example.completion, example.line) == ("a", "b", 3)


def test_the_text_field_can_have_another_name():
    options = RecordOptions(text_field="body")
    assert detect_format({"body": "a"}, options) == "text"
    assert read_record({"body": "a"}, 0, "text", options).text == "a"


def test_sharegpt_roles_are_mapped_and_its_system_comes_first():
    turns = [
        ("human", "a"),
        ("chatgpt", "b"),
        ("user", "c"),
        ("bing", "d"),
        ("observation", "e"),
        ("gpt", "f"),
    ]
    record = {"system": "s", "conversations": [{"from": who, "value": text} for who, text in turns]}
    example = read_record(record, 0, "sharegpt", RecordOptions())
    assert [m["role"] for m in example.messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert [m["content"] for m in example.messages] == ["s", "a", "b", "c", "d", "e", "f"]


def test_a_sharegpt_call_becomes_a_tool_call_where_the_template_shows_them():
    call = {"name": "f", "arguments": {"x": 8.854e-12}}
    record = {
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "function_call", "value": json.dumps(call)},
        ],
        "tools": '[{"name": "f"}]',
    }
    shown = read_record(copy.deepcopy(record), 0, "sharegpt", RecordOptions())
    assert shown.messages[1]["tool_calls"] == [{"type": "function", "function": call}]
    assert shown.tools == [{"name": "f"}]
    as_text = read_record(copy.deepcopy(record), 0, "sharegpt", RecordOptions(tool_calls=False))
    assert as_text.messages[1] == {"role": "assistant", "content": json.dumps(call)}


def test_alpaca_is_a_chat_or_the_stanford_layout():
    chat = read_record(
        {**ALPACA, "history": [["p", "q"]], "system": "s"}, 0, "alpaca", RecordOptions()
    )
    assert [(m["role"], m["content"]) for m in chat.messages] == [
        ("system", "s"),
        ("user", "p"),
        ("assistant", "q"),
        ("user", "do\nthis"),
        ("assistant", "done"),
    ]
    assert chat.prompt_messages == chat.messages[:-1]
    plain = read_record(ALPACA, 0, "alpaca", RecordOptions(chat=False))
    assert plain.prompt.endswith("### Instruction:\ndo\n\n### Input:\nthis\n\n### Response:\n")
    assert plain.completion == "done"
    without = read_record({**ALPACA, "input": ""}, 0, "alpaca", RecordOptions(chat=False))
    assert "### Input" not in without.prompt


def test_typed_text_parts_are_joined():
    parts = [
        {"type": "text", "text": "a"},
        {"type": "text", "value": "b"},
        {"type": "text", "content": "c"},
    ]
    example = read_record(
        {"messages": [{"role": "user", "content": parts}, CHAT[1]]}, 0, "messages", RecordOptions()
    )
    assert example.messages[0]["content"] == "abc"


def test_reasoning_and_tool_call_parts_become_keys_of_the_message():
    call = {"name": "f", "arguments": {"x": 1}}
    parts = [
        {"type": "reasoning", "value": "hm"},
        {"type": "text", "value": "a"},
        {"type": "tool_call", "value": json.dumps(call)},
    ]
    record = {"messages": [CHAT[0], {"role": "assistant", "content": parts}]}
    _, message = read_record(copy.deepcopy(record), 0, "messages", RecordOptions()).messages
    assert message == {
        "role": "assistant",
        "content": "a",
        "reasoning_content": "hm",
        "tool_calls": [{"type": "function", "function": call}],
    }
    with pytest.raises(
        InvalidRecord,
        match="content part of type 'tool_call', which the chat template cannot show",
    ):
        read_record(copy.deepcopy(record), 0, "messages", RecordOptions(tool_calls=False))


def test_calls_keep_their_ids_and_an_empty_list_of_calls_is_rejected():
    calls = [{"id": name, "name": name, "arguments": {}} for name in "fg"]
    record = {"messages": [CHAT[0], {"role": "tool_call", "content": calls}]}
    _, message = read_record(record, 0, "messages", RecordOptions()).messages
    assert [call["id"] for call in message["tool_calls"]] == ["f", "g"]
    for turn in (
        {"role": "tool_call", "content": []},
        {"role": "assistant", "content": [{"type": "tool_call", "value": "[]"}]},
    ):
        with pytest.raises(InvalidRecord, match="has no call") as caught:
            read_record({"messages": [CHAT[0], turn]}, 0, "messages", RecordOptions())
        assert caught.value.reason == "bad_tool"


def test_turns_with_from_keep_the_keys_that_templates_show():
    turns = [{"from": "gpt", "value": "b", "tool_plan": "p", "citations": ["c"], "at": 1}]
    (message,) = read_record({"conversations": turns}, 0, "sharegpt", RecordOptions()).messages
    assert message == {"role": "assistant", "content": "b", "tool_plan": "p", "citations": ["c"]}


def test_alpaca_without_a_template_keeps_system_and_history():
    record = {**ALPACA, "history": [["p", "q"]], "system": "s"}
    plain = read_record(record, 0, "alpaca", RecordOptions(chat=False))
    assert plain.prompt.startswith("s\n\nBelow is an instruction")
    assert "### Instruction:\np\n\n### Response:\nq\n\nBelow" in plain.prompt


def test_switches_become_weights():
    messages = [
        {**CHAT[0], "train": False},
        {**CHAT[1], "loss_weight": 0.5},
        {**CHAT[1], "weight": None},
    ]
    assert read_record({"messages": messages}, 0, "messages", RecordOptions()).weights == [
        0.0,
        0.5,
        None,
    ]
    assert read_record({"messages": CHAT}, 0, "messages", RecordOptions()).weights is None


@pytest.mark.parametrize(
    ("fields", "trained", "lengths"),
    [
        ({}, [1, 1, 1, 1], [4]),
        ({"labels": [-100, 5, -100, 7]}, [0, 1, 0, 1], [4]),
        ({"labels": [4, -100, 6, -100], "completion_mask": [0, 0, 0, 0]}, [1, 0, 1, 0], [4]),
        (
            {"completion_mask": [0, 1, 1, 1], "assistant_masks": [True, True, False, True]},
            [0, 1, 0, 1],
            [4],
        ),
        ({"seq_lengths": [3, 1]}, [1, 1, 1, 1], [3, 1]),
        ({"position_ids": [0, 1, 0, 1]}, [1, 1, 1, 1], [2, 2]),
        (
            {
                "position_ids": [0, 1, 0, 1],
                "seq_lengths": [2, 0, 2],
                "attention_mask": [1, 1, 1, 1],
            },
            [1, 1, 1, 1],
            [2, 2],
        ),
    ],
)
def test_tokens_are_used_without_change(fields, trained, lengths):
    record = {"input_ids": [4, 5, 6, 7], **fields}
    row = read_record(record, 0, "tokens", RecordOptions()).pretokenized
    assert row.input_ids.tolist() == [4, 5, 6, 7]
    assert row.trained.tolist() == [bool(x) for x in trained]
    assert row.lengths.tolist() == lengths


def test_rows_of_tokens_with_padding_are_rejected():
    with pytest.raises(InvalidRecord, match="padding") as caught:
        read_record(
            {"input_ids": [4, 5, 0], "attention_mask": [1, 1, 0]}, 0, "tokens", RecordOptions()
        )
    assert caught.value.reason == "padding"


def test_an_empty_list_of_tools_is_none_and_tools_as_json_text_are_parsed():
    assert (
        read_record({"messages": CHAT, "tools": []}, 0, "messages", RecordOptions()).tools is None
    )
    tool = {"type": "function", "function": {"name": "f"}}
    for tools in ([tool], json.dumps([tool]), [json.dumps(tool)]):
        assert read_record(
            {"messages": CHAT, "tools": tools}, 0, "messages", RecordOptions()
        ).tools == [tool]


@pytest.mark.parametrize(
    ("name", "record", "reason"),
    [
        ("messages", {}, "bad_row"),
        ("messages", SHAREGPT, "other_schema"),
        ("messages", ALPACA, "other_schema"),
        ("messages", {"messages": None}, "bad_row"),
        ("messages", {"messages": []}, "bad_row"),
        ("messages", {"messages": CHAT[0]}, "bad_row"),
        ("messages", {"messages": ["hi"]}, "bad_row"),
        ("messages", {"messages": [{"content": "a"}]}, "bad_row"),
        ("messages", {"messages": [{"role": "narrator", "content": "a"}]}, "unknown_role"),
        ("messages", {"messages": [{"role": "user", "content": None}]}, "bad_row"),
        ("messages", {"messages": [{"role": "user", "content": 7}]}, "bad_type"),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
            "unsupported_part",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "images",
        ),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "bad_row"),
        (
            "messages",
            {"messages": [{"role": "assistant", "content": [{"type": "tool_call", "value": "{"}]}]},
            "bad_tool",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": "a", "weight": float("nan")}]},
            "bad_type",
        ),
        ("tokens", {"input_ids": "a"}, "bad_type"),
        ("tokens", {"input_ids": [1.5]}, "bad_type"),
        ("tokens", {"input_ids": [1, True]}, "bad_type"),
        ("tokens", {"input_ids": [True, False]}, "bad_type"),
        ("tokens", {"input_ids": [1], "labels": [True]}, "bad_type"),
        ("tokens", {"input_ids": [[1]]}, "bad_type"),
        ("tokens", {"input_ids": [-1]}, "bad_type"),
        ("tokens", {"input_ids": [2**31]}, "bad_type"),
        ("tokens", {"input_ids": [1, 2], "completion_mask": [0, 2]}, "bad_type"),
        ("tokens", {"input_ids": [1, 2], "assistant_masks": [0, -1]}, "bad_type"),
        ("tokens", {"input_ids": [1, 2], "labels": [1]}, "bad_row"),
        ("tokens", {"input_ids": [1, 2], "labels": [-100, 3]}, "other_labels"),
        ("tokens", {"input_ids": [1, 2], "seq_lengths": [1]}, "bad_row"),
        ("tokens", {"input_ids": [1, 2], "position_ids": [1, 2]}, "bad_row"),
        (
            "tokens",
            {"input_ids": [1, 2, 3], "position_ids": [0, 1, 0], "seq_lengths": [1, 2]},
            "bad_row",
        ),
        ("messages", {"messages": CHAT, "tools": "{"}, "bad_tool"),
        ("messages", {"messages": CHAT, "tools": {"f": {"name": "f"}}}, "bad_tool"),
        ("messages", {"messages": CHAT, "chat_template_kwargs": [1]}, "bad_type"),
        ("prompt-completion", {"prompt": "a", "completion": 7}, "bad_type"),
        ("prompt-completion", {"prompt": "a", "completion": None}, "bad_row"),
        ("prompt-completion", {"prompt": CHAT, "completion": {"a": "b"}}, "bad_type"),
        ("prompt-completion", {"prompt": "a", "completion": []}, "bad_row"),
        ("prompt-completion", {"prompt": "a"}, "bad_row"),
        ("sharegpt", {"conversations": [{"from": "human", "valeu": "a"}]}, "bad_row"),
        ("sharegpt", {"conversations": [{"from": "narrator", "value": "a"}]}, "unknown_role"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "f(1)"}]}, "bad_tool"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "[1]"}]}, "bad_tool"),
        ("sharegpt", {"conversations": "a"}, "bad_row"),
        ("alpaca", {"instruction": "a", "output": 5}, "bad_type"),
        ("alpaca", {"instruction": "a", "output": ["b"]}, "bad_type"),
        (
            "messages",
            {"messages": [{**CHAT[0], "weight": 1, "train": False}]},
            "bad_row",
        ),
        ("messages", {"messages": [{**CHAT[0], "loss": 1.73}]}, "bad_type"),
        ("messages", {"messages": CHAT, "images": ["a.png"]}, "images"),
        ("text", {"text": "a", "image": "a.png"}, "images"),
        ("alpaca", {**ALPACA, "history": ["a"]}, "bad_row"),
        ("text", {"text": 5}, "bad_type"),
        ("text", {"txt": "a"}, "bad_row"),
    ],
)
def test_a_record_that_does_not_fit_is_rejected_with_a_reason(name, record, reason):
    with pytest.raises(InvalidRecord) as caught:
        read_record(copy.deepcopy(record), 0, name, RecordOptions())
    assert caught.value.reason == reason
    assert str(caught.value)


def test_no_malicious_value_raises_another_kind_of_error():
    for value in (
        None,
        0,
        1.5,
        True,
        "",
        "x",
        [],
        [None],
        [[]],
        {},
        {"role": []},
        [{"role": []}],
        [{"from": [], "value": 1}],
    ):
        for name, kind in FORMATS.items():
            for key in kind.keys:
                record = {k: value if k == key else "x" for k in kind.keys}
                with contextlib.suppress(InvalidRecord):
                    read_record(record, 0, name, RecordOptions())


def test_a_column_of_bytes_is_named_as_bytes():
    row = b'{"text":{"$opaque":"bytes"}}'
    with pytest.raises(InvalidRecord, match='"text" holds bytes, not text'):
        read_record(json.loads(row), 0, "text", RecordOptions())
    assert excerpt(row) == '{"text":<bytes>}'


@pytest.mark.parametrize(
    ("name", "record", "expected"),
    [
        (
            "messages",
            {"messages": [{"role": "user", "content": 7}]},
            'the content of message 1 of "messages" is an integer, not text',
        ),
        (
            "messages",
            {"messages": {"role": []}},
            '"messages" is an object, not a list of messages such as {"role": "user",'
            ' "content": "..."}',
        ),
        ("messages", {"messages": [None]}, 'message 1 of "messages" is null, not an object'),
        ("text", {"text": True}, '"text" is a boolean, not text'),
        ("text", {"text": 0.5}, '"text" is a number, not text'),
        (
            "sharegpt",
            {"conversations": ["Name a river."]},
            'message 1 of "conversations" is a string; a list of strings, which are turns of the'
            " user and the assistant, needs two or more, and no other values",
        ),
    ],
)
def test_a_value_of_another_type_is_named_in_words_of_json(
    name: str, record: dict[str, Any], expected: str
) -> None:
    with pytest.raises(InvalidRecord) as caught:
        read_record(record, 0, name, RecordOptions())
    assert str(caught.value) == expected
