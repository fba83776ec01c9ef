"""Tool calls are validated, and tools get the form that the template needs."""

from __future__ import annotations

import json

import pytest

from sftprep.records.options import InvalidRecord
from sftprep.records.tool_calls import clean_calls
from tests.semantics.conftest import CHATML
from tests.semantics.prepared import prepare

TOOL = {"type": "function", "function": {"name": "tide", "parameters": {}}}
FLAT = {"name": "tide", "description": "High water", "parameters": {"type": "object"}}
SHOWING = (
    "{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments if"
    " c.function.arguments is string else c.function.arguments | tojson }}]{% endfor %}<|im_end|>\n"
    "{% endfor %}"
)
"""A template that accepts arguments as objects and as text, and wrapped tools only."""
TEXT_ONLY = SHOWING.replace("c.function.arguments | tojson", "raise_exception('objects')")


def calling(*calls, tools=None, **more):
    """Return a record with these functions as calls."""
    message = {"role": "assistant", "content": "", **more}
    message["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    messages = [{"role": "user", "content": "When?"}, message, {"role": "tool", "content": "14:05"}]
    return {"messages": messages, **({} if tools is None else {"tools": tools})}


def rejection(row, folder, **settings):
    (rejected,) = prepare([row], folder, **settings).batch.rejected
    return rejected.reason, rejected.message


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("{harbour: Husum}", "are not JSON"),
        ("{'harbour': 'Husum'}", "are not JSON"),
        ('{"harbour": "Husum"}}', "are not JSON"),
        ('{"depth": NaN}', "are not JSON"),
        (json.dumps(json.dumps({"harbour": "Husum"})), "were encoded twice"),
        ("[1]", "are JSON text of an array"),
        ("3", "are JSON text of a number"),
        (["Husum"], "are an array"),
        (True, "are a boolean"),
    ],
)
@pytest.mark.parametrize("on_bad_record", ["error", "quarantine"])
def test_arguments_that_are_no_json_object_make_a_bad_record(
    folder_with, arguments, problem, on_bad_record
):
    row = calling({"name": "tide", "arguments": arguments})
    reason, message = rejection(row, folder_with(SHOWING), on_bad_record=on_bad_record)
    assert reason == "bad_tool"
    assert message.startswith("the arguments of call 1 of message 2 ('tide')")
    assert problem in message


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        ({"arguments": {}}, "has no name"),
        ({"name": "", "arguments": {}}, "has no name"),
        ({"name": " ", "arguments": {}}, "has no name"),
        ({"name": None, "arguments": {}}, "has no name"),
        ({"name": 5, "arguments": {}}, "has no name"),
        ("tide", "is a string, not an object"),
        (None, "has no name"),
    ],
)
def test_calls_without_a_name_make_a_bad_record(folder_with, call, problem):
    row = calling({"name": "tide", "arguments": {}}, call)
    assert rejection(row, folder_with(SHOWING)) == ("bad_tool", f"call 2 of message 2 {problem}")


@pytest.mark.parametrize(
    ("outer", "problem"),
    [
        ({"name": "get_w"}, "has different names in a call and its function"),
        ({"arguments": {"w": 1}}, "has different arguments under several keys"),
        (
            {"name": "get_w", "arguments": {"w": 1}},
            "has different names in a call and its function",
        ),
        ({"name": "get_v", "arguments": '{"v": 2}'}, None),
    ],
)
def test_a_call_with_other_values_than_its_function_is_a_bad_record(folder_with, outer, problem):
    inner = {"name": "get_v", "arguments": {"v": 2}}
    call = {"type": "function", **outer, "function": inner}
    row = {
        "messages": [
            {"role": "user", "content": "When?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
    }
    rejected = prepare([row], folder_with(SHOWING)).batch.rejected
    where = 'tool_calls of message 2 of "messages"'
    expected = [] if problem is None else [("bad_tool", f"{where} {problem}")]
    assert [(record.reason, record.message) for record in rejected] == expected


@pytest.mark.parametrize("absent", [{"content": None}, {}])
def test_calls_in_a_message_without_content_are_validated(folder_with, absent):
    row = calling({"name": "tide", "arguments": "{"})
    row["messages"][1] = {
        **{key: row["messages"][1][key] for key in ("role", "tool_calls")},
        **absent,
    }
    assert rejection(row, folder_with(SHOWING))[0] == "bad_tool"


def test_calls_of_other_layouts_are_validated(folder_with):
    folder = folder_with(SHOWING)
    turns = [{"from": "human", "value": "When?"}, {"from": "function_call", "value": ""}]
    turns[1]["value"] = json.dumps({"name": "tide", "arguments": "{harbour"})
    assert rejection({"conversations": turns}, folder)[0] == "bad_tool"
    messages = calling({"name": "tide", "arguments": "{harbour"})["messages"]
    row = {"prompt": messages[:1], "completion": messages[1:]}
    assert rejection(row, folder)[0] == "bad_tool"


@pytest.mark.parametrize("arguments", ["", " \n", None, "{}", {}])
def test_empty_arguments_are_an_empty_object(folder_with, arguments):
    made = prepare([calling({"name": "tide", "arguments": arguments})], folder_with(SHOWING))
    assert "[tide {}]" in made.text()


def test_valid_arguments_keep_their_text(folder_with):
    text = '{"depth":  8.854e-12, "id": 123456789012345678901234567890, "name": "B\\u00fcsum"}'
    made = prepare([calling({"name": "tide", "arguments": text})], folder_with(SHOWING))
    assert f"[tide {text}]" in made.text()


def test_a_template_without_absent_arguments_receives_empty_ones(folder_with):
    """As TRL does with the calls of a model; the template raises an error otherwise."""
    made = prepare([calling({"name": "tide"})], folder_with(SHOWING))
    assert made.batch.rejected == []
    assert "[tide {}]" in made.text()


def test_calls_with_text_and_with_objects_are_converted_together(folder_with):
    row = calling(
        {"name": "tide", "arguments": {"a": 1}}, {"name": "tide", "arguments": '{"b": 2}'}
    )
    made = prepare([row], folder_with(TEXT_ONLY))
    assert '[tide {"a": 1}][tide {"b": 2}]' in made.text()


@pytest.mark.parametrize(
    ("tools", "counted"),
    [
        ([TOOL], 0),
        ([FLAT], 0),
        ([{"type": "function", "function": {"name": "wind"}}], 1),
        ([{**FLAT, "name": "wind"}], 1),
        (json.dumps([{**FLAT, "name": "wind"}]), 1),
        ([json.dumps({**FLAT, "name": "wind"}), TOOL], 0),
        ([], 0),
        (None, 0),
    ],
)
def test_calls_of_tools_that_the_record_does_not_list_are_counted(folder_with, tools, counted):
    row = calling({"name": "tide", "arguments": {}}, tools=tools)
    made = prepare([row], folder_with(SHOWING), on_bad_record="quarantine")
    assert made.batch.rejected == []
    assert made.batch.counts.get("warnings.unknown_tool", 0) == counted


@pytest.mark.parametrize("tool", [FLAT, {"type": "function", **FLAT}])
@pytest.mark.parametrize("train_on", ["all", "assistant"])
def test_flat_tools_are_wrapped_where_the_template_refuses_them(folder_with, tool, train_on):
    template = SHOWING.replace("{{ t.function.name }}", "{{ t | tojson if t.function.name }}")
    template = template.replace(" if t.function.name", " ~ t.function.name[:0]")
    folder = folder_with(template)
    wrapped = {"type": "function", "function": FLAT}
    rows = [calling({"name": "tide", "arguments": {}}, tools=[t]) for t in (tool, wrapped)]
    made = prepare(rows, folder, train_on=train_on)
    assert made.batch.rejected == []
    assert made.text(0) == made.text(1)
    assert made.trained(0) == made.trained(1)


def test_flat_tools_stay_as_they_are_where_the_template_shows_them(folder_with):
    row = calling({"name": "tide", "arguments": {}}, tools=[FLAT])
    made = prepare([row], folder_with("{{ tools | tojson }}" + CHATML))
    assert json.dumps([FLAT]) in made.text()


def test_flat_tools_and_arguments_of_the_other_form_are_converted_together(folder_with):
    row = calling({"name": "tide", "arguments": {"a": 1}}, tools=[FLAT])
    del row["messages"][1]["content"]
    made = prepare([row], folder_with(TEXT_ONLY.replace("m.content }}", "m.content + '' }}")))
    assert made.batch.rejected == []
    assert "<tide><|im_start|>" in made.text()
    assert '[tide {"a": 1}]' in made.text()


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ({"name": "f", "kwargs": {"a": 1}}, {"a": 1}),
        ({"function": {"name": "f"}, "arguments": {"a": 1}}, {"a": 1}),
        ({"function": {"name": "f", "arguments": None, "parameters": {"a": 1}}}, {"a": 1}),
        ({"function": {"name": "f", "arguments": {}, "parameters": {"a": 1}}}, {"a": 1}),
        ({"function": {"name": "f", "arguments": '{"a": 1}', "args": {"a": 1}}}, '{"a": 1}'),
        ({"function": {"name": "f"}, "meta": {}}, None),
        ({"function": {"name": "f", "arguments": {"a": 1}, "args": {"b": 1}}}, InvalidRecord),
        ({"function": {"name": "f", "fields": {"a": 1}}}, InvalidRecord),
    ],
)
def test_arguments_are_read_from_any_key_and_never_lost(call, arguments):
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    if arguments is InvalidRecord:
        with pytest.raises(InvalidRecord):
            clean_calls(message, "message 1")
        return
    (found,) = clean_calls(message, "message 1")["tool_calls"]
    assert found.get("function", found).get("arguments") == arguments


def test_a_function_call_alongside_other_tool_calls_is_a_bad_record():
    one, other = ({"name": "f", "arguments": {"a": number}} for number in (1, 2))
    message = {"role": "assistant", "content": "", "tool_calls": [{"function": one}]}
    same = clean_calls({**message, "function_call": dict(one)}, "message 1")
    assert len(same["tool_calls"]) == 1
    with pytest.raises(InvalidRecord, match="another function_call"):
        clean_calls({**message, "function_call": other}, "message 1")
    no_object = [{"function": "f", "arguments": {"a": 1}}]
    with pytest.raises(InvalidRecord, match="another function_call"):
        clean_calls({**message, "tool_calls": no_object, "function_call": one}, "message 1")


# --- calls without a value ------------------------------------------------------------------------

NO_FUNCTION = {"name": None, "arguments": None}


@pytest.mark.parametrize(
    "calls",
    [
        {"function_call": NO_FUNCTION},
        {"function_call": json.dumps(NO_FUNCTION)},
        {"function_call": {"name": "", "arguments": "null"}},
        {"tool_calls": [{"id": None, "type": None, "function": NO_FUNCTION}]},
        {"tool_calls": NO_FUNCTION, "function_call": NO_FUNCTION},
    ],
)
def test_calls_without_a_value_are_no_calls(calls):
    message = {"role": "assistant", "content": "Hm", **calls}
    assert clean_calls(message, "message 1") == {"role": "assistant", "content": "Hm"}


def test_a_call_without_a_value_does_not_contradict_another_one():
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    calls = {"tool_calls": [{"function": NO_FUNCTION}, call], "function_call": NO_FUNCTION}
    message = {"role": "assistant", "content": "", **calls}
    expected = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert clean_calls(message, "message 1") == expected


@pytest.mark.parametrize("arguments", ["null", " null\n", None])
def test_null_arguments_as_text_are_null(arguments):
    for call in ({"name": "f", "arguments": arguments}, {"name": "f", "parameters": arguments}):
        message = {"role": "assistant", "content": "", "tool_calls": [{"function": call}]}
        (cleaned,) = clean_calls(message, "message 1")["tool_calls"]
        assert cleaned == {"function": {"name": "f", "arguments": None}}
