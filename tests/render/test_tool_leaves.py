"""The strings with a meaning in the schema of a tool."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftprep.render.omissions.check import ConservationCheck, Conversation
from sftprep.render.omissions.tool_leaves import copy_tool, find_tool_leaves


def strings_of(tool: Any) -> list[str]:
    return [*find_tool_leaves([tool]).values]


@pytest.mark.parametrize(
    ("parameters", "strings"),
    [
        (
            {"type": "object", "properties": {"city": {"type": "string", "description": "Where"}}},
            ["city", "Where"],
        ),
        ({"city": {"type": "str", "description": "Where"}}, ["city", "Where"]),
        ([{"name": "city", "type": "str"}], ["city"]),
        ({"type": {"type": "str", "description": "Where"}}, ["Where"]),
        ({"properties": {"name": {}, "format": {}, "title": {}}}, ["name", "format", "title"]),
        (
            {
                "properties": {
                    "a1": {
                        "items": {"properties": {"b1": {"enum": ["c1", 2], "default": "d1"}}},
                        "title": "A 1",
                        "format": "date time",
                    }
                },
                "required": ["a1"],
            },
            ["a1", "b1", "c1", 2, "d1"],
        ),
        ('{"city": {"type": "str"}}', ['{"city": {"type": "str"}}']),
        ({"$defs": {"Place": {"description": "e1"}}, "note": "two words", "id": "one"}, None),
    ],
)
def test_the_strings_of_parameters(parameters: Any, strings: list[str] | None) -> None:
    if strings is None:
        strings = ["$defs", "e1", "note", "two words", "id"]
    for key in ("parameters", "input_schema"):
        tool = {"type": "function", "function": {"name": "tide", key: parameters}}
        assert strings_of(tool) == ["tide", *strings]


def test_required_parameters_have_the_new_names() -> None:
    schema = {"type": "object", "properties": {"a1": {}, "b1": {}}, "required": ["b1", "other"]}
    copy = copy_tool({"name": "tide", "parameters": schema}, str.upper)
    assert copy == {
        "name": "TIDE",
        "parameters": {
            "type": "object",
            "properties": {"A1": {}, "B1": {}},
            "required": ["B1", "other"],
        },
    }
    assert schema["required"] == ["b1", "other"]


def test_sentinels_are_unique_and_as_long_as_the_strings() -> None:
    tools = [{"name": f"a_long_name_{n}", "description": "a"} for n in range(12)]
    found = find_tool_leaves(tools)
    assert len({*found.sentinels}) == 24
    assert [*map(len, found.sentinels[::2])] == [*map(len, found.values[::2])]
    assert found.copy[0] == {"name": found.sentinels[0], "description": found.sentinels[1]}


def test_tools_with_long_integers_are_read() -> None:
    assert strings_of({"name": "tide", "maximum": 1 << 70}) == ["tide"]


def render_names(conversation: Conversation) -> str:
    """Write the names of tools, and everything in the messages."""
    names = "".join(tool["name"] for tool in conversation.tools or [])
    return names + json.dumps(conversation.messages)


@pytest.mark.parametrize("name", ["departure_date", "day"])
def test_a_name_that_only_a_call_shows_is_an_omission(name: str) -> None:
    call = {"function": {"name": "sail", "arguments": {name: "Monday"}}}
    messages = [{"role": "assistant", "content": "a", "tool_calls": [call]}]
    tools = [{"name": "sail", "parameters": {"properties": {name: {"type": "string"}}}}]
    conversation = Conversation(messages, tools)
    check = ConservationCheck(render_names)
    text = render_names(conversation)
    # The name of the parameter is a piece of the text, but as a key of the call.
    for pieces in ((), (name, "sail", "Monday", text)):
        assert check.find_omissions(conversation, text, pieces).kinds == {"tools_not_shown"}


words = st.text("abcdef ", max_size=6)
schemas = st.recursive(
    st.fixed_dictionaries(
        {}, optional={"type": words, "description": words, "enum": st.lists(words)}
    ),
    lambda inner: st.fixed_dictionaries(
        {}, optional={"properties": st.dictionaries(words, inner, max_size=3), "items": inner}
    ),
    max_leaves=8,
)


@given(st.lists(st.fixed_dictionaries({"name": words, "parameters": schemas}), max_size=3))
def test_tools_that_are_written_as_a_whole_have_no_omission(tools: list[Any]) -> None:
    def render(conversation: Conversation) -> str:
        return json.dumps(conversation.tools)

    conversation = Conversation([], tools)
    check = ConservationCheck(render)
    assert not check.find_omissions(conversation, render(conversation)).kinds


@given(st.lists(st.fixed_dictionaries({"name": words, "parameters": schemas}), max_size=3))
def test_each_string_that_is_left_out_is_an_omission(tools: list[Any]) -> None:
    strings = find_tool_leaves(tools).values
    check = ConservationCheck(lambda _: "")
    found = check.find_omissions(Conversation([], tools), "").kinds
    assert found == ({"tools_not_shown"} if strings else set())
