"""Contents that the template writes by itself are not found by chance, as they may be omitted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.conservation import SPECIAL_TOKENS, found_by, make_check
from sftprep.chat_template.template import ChatTemplate

trl = pytest.importorskip("trl")
FOLDER = Path(trl.__file__).parent / "chat_templates"
QUESTION = {"role": "user", "content": "How tall is it?"}
ANSWER = {"role": "assistant", "content": "It is 44 m tall."}
RESULT = {"role": "tool", "content": "44 m", "tool_call_id": "call_abcd"}


def calling(text: str) -> dict[str, Any]:
    function = {"name": "measure_height", "arguments": {"building_name": "Roter Sand"}}
    call = {"id": "call_abcd", "type": "function", "function": function}
    return {"role": "assistant", "content": text, "tool_calls": [call]}


def omitted(
    template_name: str, messages: list[dict[str, Any]], tools: list[Any] | None = None
) -> set[str]:
    source = (FOLDER / f"{template_name}.jinja").read_text(encoding="utf-8")
    return omitted_by(source, messages, tools)


def omitted_by(
    source: str, messages: list[dict[str, Any]], tools: list[Any] | None = None
) -> set[str]:
    messages = json.loads(json.dumps(messages))  # parsers make each string an object of its own
    template = ChatTemplate(source, variables=SPECIAL_TOKENS)
    rendering = template.render_pieces(messages, tools)
    return set(found_by(make_check(source), messages, tools, rendering, template))


@pytest.mark.parametrize(
    ("template", "messages", "kind"),
    [
        (
            "qwen2_5",
            [{"role": "developer", "content": "You are a helpful assistant."}, QUESTION, ANSWER],
            "message_not_shown",
        ),
        ("gptoss", [QUESTION, calling("commentary"), RESULT, ANSWER], "text_with_call_not_shown"),
        ("gptoss", [QUESTION, calling("functions"), RESULT, ANSWER], "text_with_call_not_shown"),
        (
            "llama3_2",
            [QUESTION, calling("Cutting Knowledge Date"), RESULT, ANSWER],
            "text_with_call_not_shown",
        ),
        (
            "llama3_2",
            [QUESTION, calling("building_name"), RESULT, ANSWER],
            "text_with_call_not_shown",
        ),
        (
            "qwen3",
            [QUESTION, {**ANSWER, "reasoning_content": "assistant"}, QUESTION, ANSWER],
            "reasoning_not_shown",
        ),
        ("qwen3", [QUESTION, {**ANSWER, "name": "assistant"}], "name_not_shown"),
    ],
)
def test_a_content_that_the_template_writes_by_itself_is_an_omission(
    template: str, messages: list[dict[str, Any]], kind: str
) -> None:
    assert omitted(template, messages) == {kind}


SHOWN_ONCE = "{{ strftime_now('Today is %d %B %Y') }}{% for m in messages %}{{ m.role | upper }}: "
PARTS = "{{ 'Speak ' + 'slowly: ' }}{% if m.role == 'user' %}{{ m.content }}{% endif %}"


@pytest.mark.parametrize(
    "content", ["Today is 26 July 2024", "26 July 2024", "ASSISTANT", "Speak slowly", "call_abcd"]
)
def test_a_text_of_several_literals_or_of_a_filter_is_an_omission(content: str) -> None:
    ids = "{{ m.tool_calls[0].id if m.tool_calls }}{% endfor %}"
    messages = [QUESTION, {**calling(content), "tool_calls": calling("")["tool_calls"]}]
    found = omitted_by(SHOWN_ONCE + PARTS + ids, messages)
    assert "text_with_call_not_shown" in found


@pytest.mark.parametrize(
    "content", [" You are a helpful assistant.", "assistant", " assistant\n", "tool_call", "user"]
)
def test_such_a_content_that_is_written_is_not_an_omission(content: str) -> None:
    for template in ("qwen2_5", "qwen3", "llama3_2", "gptoss"):
        messages = [
            {"role": "system", "content": content},
            {"role": "user", "content": content},
            {"role": "assistant", "content": content},
        ]
        assert omitted(template, messages) == set()


def tool_with(**schema: Any) -> list[Any]:
    parameters = {"type": "object", "properties": {"harbour_code": {"type": "integer", **schema}}}
    function = {"name": "find_tide", "description": "Find it now.", "parameters": parameters}
    return [{"type": "function", "function": function}]


@pytest.mark.parametrize(
    "schema", [{"enum": [70001, 70002]}, {"default": 81234}, {"default": 0.25}, {"const": 3}]
)
@pytest.mark.parametrize(("template", "drops"), [("gemma4_v2", True), ("qwen3", False)])
def test_a_number_that_a_parameter_may_have_is_an_omission(
    template: str, drops: bool, schema: dict[str, Any]
) -> None:
    found = omitted(template, [QUESTION, ANSWER], tool_with(**schema))
    assert found == ({"tools_not_shown"} if drops else set())


@pytest.mark.parametrize("schema", [{"minimum": 1}, {"maximum": 99999}, {"default": True}, {}])
def test_limits_and_booleans_of_a_parameter_are_not_searched_for(schema: dict[str, Any]) -> None:
    assert omitted("gemma4_v2", [QUESTION, ANSWER], tool_with(**schema)) == set()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ("The tag </think> closes reasoning.", "message_not_shown"),
        ("Write </think>\nafter it.", "message_not_shown"),
        ("Two and two.\n</think>\n\nFour.", "reasoning_not_shown"),
        ("<think>Two and two.</think>Four.", "reasoning_not_shown"),
        ("First.<think>Two and two.</think>Four.", "message_not_shown"),
    ],
)
def test_text_before_a_closing_tag_is_reasoning_only_in_a_block(content: str, kind: str) -> None:
    messages = [QUESTION, {"role": "assistant", "content": content}, QUESTION, ANSWER]
    assert kind in omitted("qwen3", messages)
    if content[0] != "F":
        assert omitted("qwen3", messages) == {kind}
