"""Tools and arguments travel as JSON: numbers keep their value and kind, and keys that are not
there stay so."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftprep.records.options import find_long_numbers, has_long_number
from tests.semantics.prepared import prepare

SHOWING = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}{{ '<|im_start|>' +"
    " m.role + '\n' + m.content }}{% for call in m.tool_calls or [] %}{{ call.function.name }}({{"
    " call.function.arguments | tojson }}){% endfor %}{{ '<|im_end|>\n' }}{% endfor %}{% if"
    " add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NUMBERS = [
    "8.854e-12",
    "0.6",
    "1.0",
    "1",
    "-0.0",
    "123456789.12345679",
    "1e+16",
    "9007199254740993",
    "18446744073709551616",
    "-123456789012345678901234567890",
]


def rows_of(number: str) -> list[str]:
    """Lines of JSON, as a file has them: the number in a schema and in arguments; a second record
    has other keys."""
    line = (
        '{"messages": [{"role": "user", "content": "go"}, {"role": "assistant", "content": "",'
        ' "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x":'
        ' NUMBER}}}]}], "tools": [{"type": "function", "function": {"name": "f", "parameters":'
        ' {"x": {"minimum": NUMBER}}}}]}'
    )
    return [line.replace("NUMBER", number), line.replace("NUMBER", number).replace('"x"', '"y"')]


@pytest.mark.parametrize("number", NUMBERS)
def test_a_number_keeps_its_digits(folder_with, number):
    made = prepare(rows_of(number), folder_with(SHOWING), max_length=4096)
    for row, key in enumerate("xy"):
        text = made.text(row)
        assert f'f({{"{key}": {number}}})' in text
        assert f'"parameters": {{"{key}": {{"minimum": {number}}}}}' in text
        assert "null" not in text


@pytest.mark.parametrize(
    ("written", "shown"), [("1E5", "100000.0"), ("1.10", "1.1"), ("1e400", None)]
)
def test_other_spellings_of_a_number_are_normalized_as_by_pythons_json(folder_with, written, shown):
    """As in TRL, which parses the same JSON; a number beyond the range of floats is bad JSON."""
    made = prepare(rows_of(written)[:1], folder_with(SHOWING), max_length=4096)
    if shown is None:
        assert [r.reason for r in made.batch.rejected] == ["bad_json"]
        return
    assert json.dumps(json.loads(written)) == shown
    assert f'f({{"x": {shown}}})' in made.text()


@pytest.mark.parametrize("number", NUMBERS)
def test_tools_as_json_text_are_rendered_alike(folder_with, number):
    rows = rows_of(number)
    objects = prepare(rows, folder_with(SHOWING), max_length=4096)
    inner = rows[0].partition('"tools": ')[2][:-1]
    as_text = rows[0].replace(inner, json.dumps(inner))
    assert prepare([as_text], folder_with(SHOWING), max_length=4096).text() == objects.text()


def test_datasets_would_change_numbers_and_keys():
    """The reason why tools are not stored in Arrow: small numbers become 0, fractions change, and
    missing keys become null."""
    datasets = pytest.importorskip("datasets")
    rows = [json.loads(line) for line in (rows_of("8.854e-12")[0], rows_of("0.6")[1])]
    mixed = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    parameters = [row["tools"][0]["function"]["parameters"] for row in mixed]
    assert parameters == [{"x": {"minimum": 0.0}}, {"y": {"minimum": 0.6000000000000001}}]
    structs = datasets.Dataset.from_list(
        [{"tools": [row["tools"][0]["function"]["parameters"]]} for row in rows]
    )
    assert structs[0]["tools"] == [{"x": {"minimum": 8.854e-12}, "y": None}]


CALL = "m.tool_calls[0].function.arguments"
WANTS = {
    "objects": (
        f"{{% if m.tool_calls %}}{{% for k, v in {CALL}.items() %}}{{{{ k }}}}={{{{ v }}}}{{%"
        " endfor %}{% endif %}"
    ),
    "text": f"{{% if m.tool_calls %}}{{{{ '' + {CALL} }}}}{{% endif %}}",
}


@pytest.mark.parametrize("wants", WANTS)
@pytest.mark.parametrize(
    "arguments", [{"x": 8.854e-12}, '{"x": 8.854e-12}'], ids=["objects given", "text given"]
)
@pytest.mark.parametrize("backend", ["auto", "jinja"])
def test_arguments_are_passed_in_the_form_that_the_template_accepts(
    folder_with, wants, arguments, backend
):
    template = (
        "{% for m in messages %}{{ m.role + ':' + m.content }}"
        + WANTS[wants]
        + "{{ '<|im_end|>\n' }}{% endfor %}"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    made = prepare([{"messages": messages}], folder_with(template), template_backend=backend)
    shown = "x=8.854e-12" if wants == "objects" else '{"x": 8.854e-12}'
    assert made.text() == f"user:go<|im_end|>\nassistant:{shown}<|im_end|>\n"


def test_if_both_forms_are_rejected_the_error_is_that_of_the_record(folder_with):
    template = (
        "{% for m in messages %}{% if m.tool_calls %}{{ raise_exception('no tools here') }}{% endif"
        " %}{% endfor %}"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    (rejected,) = prepare([{"messages": messages}], folder_with(template)).batch.rejected
    assert (rejected.reason, "no tools here" in rejected.message) == ("template_error", True)


@given(st.lists(st.text("9a\r ", max_size=40), max_size=8))
def test_lines_with_long_numbers_are_found(lines):
    data = "".join(f"{line}\n" for line in lines).encode()
    expected = {k for k, line in enumerate(data.split(b"\n")) if has_long_number(line)}
    assert find_long_numbers(data) == expected
