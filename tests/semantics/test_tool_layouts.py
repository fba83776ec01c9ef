"""Tools and calls in the layouts of LangChain, Gemini, Bedrock and xlam."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.conservation import templates_of_trl
from sftprep.records.formats import read_record
from sftprep.records.options import InvalidRecord, RecordOptions
from sftprep.records.tool_schemas import read_tools, to_json_schema
from tests.semantics.conftest import CHATML
from tests.semantics.prepared import prepare

CITY = "The name of a harbour."
CHAT = [{"role": "user", "content": "When?"}, {"role": "assistant", "content": "At noon."}]


def tool(parameters: Any) -> dict[str, Any]:
    return {"name": "tide", "description": "High water", "parameters": parameters}


def omissions_in(counts: Any) -> set[str]:
    return {name for name in counts if name.endswith("_not_shown")}


@pytest.mark.parametrize(
    "parameters",
    [
        {"city": {"type": "str", "description": CITY}},
        [{"name": "city", "type": "string", "description": CITY}],
        {"type": "object", "properties": {"city": {"type": "string", "description": CITY}}},
    ],
)
def test_gpt_oss_shows_parameters_that_are_no_json_schema(
    folder_with: Any, parameters: Any
) -> None:
    folder = folder_with(templates_of_trl()["gptoss"])
    made = prepare([{"messages": CHAT, "tools": [tool(parameters)]}], folder)
    assert f"type tide = (_: {{\n// {CITY}\ncity?: string,\n}}) => any;" in made.text()
    assert omissions_in(made.batch.counts) == set()


def test_a_template_that_writes_tools_as_json_receives_tables_unchanged(folder_with: Any) -> None:
    template = "{{ tools | tojson }}{{ tools[0].parameters is defined }}" + CHATML
    row = {"messages": CHAT, "tools": [tool({"city": {"type": "str", "description": CITY}})]}
    text = prepare([row], folder_with(template)).text()
    assert '"parameters": {"city": {"type": "str", "description": "' in text


PARTLY_SHOWN = {
    "type": "object",
    "properties": {
        "city": {
            "type": "object",
            "properties": {"name": {"type": "string", "description": CITY}},
        }
    },
}
"""The template of gpt-oss shows the names of nested parameters without their descriptions."""


@pytest.mark.parametrize(
    "parameters",
    [
        PARTLY_SHOWN,
        {"city": CITY},
        {"type": "object", "properties": {}, "$defs": {"a": {"description": CITY}}},
        {"type": "object", "properties": {"city": {"type": "integer", "enum": ["Husum", "Kiel"]}}},
    ],
)
def test_parts_of_parameters_that_gpt_oss_drops_are_counted(
    parameters: Any, folder_with: Any
) -> None:
    folder = folder_with(templates_of_trl()["gptoss"])
    rows = [{"messages": CHAT}, {"messages": CHAT, "tools": [tool(parameters)]}]
    batch = prepare(rows, folder, on_bad_record="quarantine").batch
    assert batch.rejected == []
    assert omissions_in(batch.counts) == {"warnings.tools_not_shown"}
    assert batch.counts["warnings.tools_not_shown"] == 1
    assert batch.first_lines["warnings.tools_not_shown"] == 1


def test_a_parameter_that_gemma_takes_for_a_word_of_the_schema_is_counted(folder_with: Any) -> None:
    folder = folder_with(templates_of_trl()["gemma4_v2"])
    for name, number in (("type", 1), ("kind", 0)):
        schema = {
            "type": "object",
            "properties": {name: {"type": "string", "description": CITY}},
        }
        counts = prepare([{"messages": CHAT, "tools": [tool(schema)]}], folder).batch.counts
        assert counts.get("warnings.tools_not_shown", 0) == number


@pytest.mark.parametrize(
    ("parameters", "schema"),
    [
        (
            {
                "city": {"type": "str", "description": "a"},
                "days": {"type": "int, optional"},
                "kinds": {"type": "List[str]", "default": ""},
            },
            {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "a"},
                    "days": {"type": "integer"},
                    "kinds": {"type": "array", "items": {"type": "string"}, "default": ""},
                },
                "required": ["city"],
            },
        ),
        (
            [{"name": "city", "type": "bool", "required": True}, {"name": "day", "type": "dict"}],
            {
                "type": "object",
                "properties": {"city": {"type": "boolean"}, "day": {"type": "object"}},
                "required": ["city", "day"],
            },
        ),
        (
            {"type": {"type": "Optional[float]", "description": "b"}},
            {
                "type": "object",
                "properties": {"type": {"type": "number", "description": "b"}},
                "required": [],
            },
        ),
        (
            {"pair": {"type": "Tuple[int, int]"}, "any": {"type": "Union[int, str]"}},
            {
                "type": "object",
                "properties": {"pair": {"type": "array"}, "any": {"type": "Union[int, str]"}},
            },
        ),
    ],
)
def test_a_table_of_parameters_becomes_a_json_schema(parameters: Any, schema: Any) -> None:
    assert to_json_schema(parameters) == schema


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "object", "properties": {}},
        {"properties": {"city": {"type": "string"}}},
        {"type": "object", "city": {"type": "string"}},
        {"anyOf": [{"type": "object"}]},
        {"city": "The name of a harbour."},
        {"city": {"harbour": {"type": "string"}}},
        [{"type": "string"}],
        [{"name": "a", "type": "string"}, {"name": "a", "type": "string"}],
        {},
        [],
        "city",
        None,
    ],
)
def test_parameters_that_are_not_certainly_a_table_are_unchanged(parameters: Any) -> None:
    assert to_json_schema(parameters) == parameters


@pytest.mark.parametrize("key", ["functionDeclarations", "function_declarations"])
def test_tools_of_gemini_are_read(key: str, folder_with: Any) -> None:
    parameters = {"type": "OBJECT", "properties": {"city": {"type": "STRING"}}}
    tools = [{key: [tool(parameters), {"name": "wind", "parametersJsonSchema": {"a": 1}}]}]
    expected = {"type": "object", "properties": {"city": {"type": "string"}}}
    assert read_tools(tools) == [
        {"type": "function", "function": tool(expected)},
        {"type": "function", "function": {"name": "wind", "parameters": {"a": 1}}},
    ]
    folder = folder_with(templates_of_trl()["gptoss"])
    contents = [{"role": "user", "parts": [{"text": "a"}]}, {"role": "model", "parts": ["b"]}]
    made = prepare([{"contents": contents, "tools": {key: [tool(parameters)]}}], folder)
    assert "type tide = (_: {\ncity?: string,\n}) => any;" in made.text()


def test_tools_of_bedrock_are_read() -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    specification = {"name": "tide", "inputSchema": {"json": schema}}
    assert read_tools([{"toolSpec": specification}]) == [
        {"type": "function", "function": {"name": "tide", "parameters": schema}}
    ]


def test_a_single_tool_is_a_list_of_one() -> None:
    flat, nested = tool({}), {"type": "function", "function": tool({})}
    for single in (flat, nested):
        assert read_tools(single) == read_tools(json.dumps(single)) == [single]
    with pytest.raises(InvalidRecord, match=r'an object, not a list of .* \[\{"type": "function"'):
        read_tools({"tide": {"description": "High water"}})


def test_parts_of_bedrock_are_read(folder_with: Any) -> None:
    call = {"toolUseId": "t1", "name": "tide", "input": {"city": "Husum"}}
    result = {"toolUseId": "t1", "content": [{"text": "Noon."}, {"json": {"level": 3}}]}
    thought = {"reasoningText": {"text": "It is noon.", "signature": "x"}}
    turns = [
        {"role": "user", "content": [{"text": "When?"}]},
        {"role": "assistant", "content": [{"text": "Let me look."}, {"toolUse": call}]},
        {"role": "user", "content": [{"toolResult": result}]},
        {"role": "assistant", "content": [{"reasoningContent": thought}, {"text": "At noon."}]},
    ]
    example = read_record({"messages": turns}, 0, "messages", RecordOptions())
    function = {"name": "tide", "arguments": {"city": "Husum"}}
    assert example.messages == [
        {"role": "user", "content": "When?"},
        {
            "role": "assistant",
            "content": "Let me look.",
            "tool_calls": [{"id": "t1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "t1", "content": 'Noon.{"level": 3}'},
        {"role": "assistant", "content": "At noon.", "reasoning_content": "It is noon."},
    ]
    assert example.unread_texts == ()
    record = {"messages": turns, "toolConfig": {"tools": [{"toolSpec": {"name": "High tide"}}]}}
    counts = prepare([record], folder_with(templates_of_trl()["qwen3"])).batch.counts
    assert counts["warnings.column_not_read:toolConfig"] == 1


@pytest.mark.parametrize(
    "tools",
    [[{"googleSearch": {}}], [{"functionDeclarations": [], "googleSearch": {}}], [{"toolSpec": 1}]],
)
def test_other_tools_are_unchanged(tools: list[Any]) -> None:
    assert read_tools(tools) == tools


@pytest.mark.parametrize("name", ["llama3_1", "gptoss", "qwen3", "deepseekv3"])
def test_calls_of_langchain_are_rendered_as_those_of_openai(name: str, folder_with: Any) -> None:
    flat = {"name": "tide", "args": {"city": "Husum"}, "id": "call_1", "type": "tool_call"}
    nested = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "tide", "arguments": {"city": "Husum"}},
    }
    rows = [
        {
            "messages": [
                {"role": "user", "content": "When?"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "14:05", "tool_call_id": "call_1"},
                {"role": "assistant", "content": "At five past two."},
            ]
        }
        for call in (flat, {k: v for k, v in nested.items() if k != "type"}, nested)
    ]
    made = prepare(rows, folder_with(templates_of_trl()[name]))
    assert made.batch.rejected == []
    assert "Husum" in made.text(0)
    assert made.text(0) == made.text(1) == made.text(2)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            {"messages": CHAT, "tools": [{"api_name": "tide"}]},
            'tool 1 has no "name", but "api_name"; tools are written as {"type": "function",',
        ),
        (
            {"messages": CHAT, "tools": [tool([1])]},
            'the "parameters" of tool 1 are an array, not a JSON schema',
        ),
        (
            {"messages": [CHAT[0], {**CHAT[1], "reasoning": ["so"]}]},
            'the "reasoning" of message 2 is an array, not text',
        ),
    ],
)
def test_the_error_of_a_template_that_fails_names_the_unusual_value(
    row: Any, problem: str, folder_with: Any
) -> None:
    template = "{% for t in tools or [] %}{{ t.function.name + t.function.parameters.a.b }}"
    template += "{% endfor %}{% for m in messages %}{{ (m.reasoning or '') + m.content }}"
    (rejected,) = prepare([row], folder_with(template + "{% endfor %}")).batch.rejected
    assert "UndefinedError: " in rejected.message or "TypeError: " in rejected.message
    assert problem in rejected.message


def test_the_message_of_a_template_is_not_extended(folder_with: Any) -> None:
    row = {"messages": CHAT, "tools": [{"api_name": "tide"}]}
    folder = folder_with("{{ raise_exception('no tools') }}")
    (rejected,) = prepare([row], folder).batch.rejected
    assert rejected.message.endswith("no tools")


@pytest.mark.parametrize(
    "part",
    [
        {"executableCode": {"language": "PYTHON", "code": "print(1)"}},
        {"codeExecutionResult": {"outcome": "OUTCOME_OK", "output": "1"}},
        {"guardContent": {"text": "a"}, "cachePoint": None},
    ],
)
def test_a_part_without_text_is_rejected_by_its_key(part: dict[str, Any], folder_with: Any) -> None:
    contents = [{"role": "user", "parts": [{"text": "a"}]}, {"role": "model", "parts": [part]}]
    (rejected,) = prepare([{"contents": contents}], folder_with(CHATML)).batch.rejected
    assert rejected.reason == "unsupported_part"
    (key, *_) = part
    assert (
        f"a content part with the key '{key}', which the chat template cannot" in rejected.message
    )
