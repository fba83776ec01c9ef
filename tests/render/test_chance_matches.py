"""Contents that the template writes by itself are not found by chance, as they may be omitted."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.conservation import (
    SPECIAL_TOKENS,
    Contents,
    Outcome,
    features,
    found_by,
    make_check,
    omitted_by_transformers,
    templates_of_trl,
)
from sftprep.chat_template.compiler.compilation import RenderedPieces
from sftprep.chat_template.template import ChatTemplate
from sftprep.core.omissions import OMISSION_KINDS
from sftprep.errors import SftprepError
from sftprep.render.omissions.check import Conversation

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
    source: str,
    messages: list[dict[str, Any]],
    tools: list[Any] | None = None,
    variables: dict[str, Any] | None = None,
    unread_texts: tuple[str, ...] = (),
) -> set[str]:
    messages = json.loads(json.dumps(messages))  # parsers make each string an object of its own
    template = ChatTemplate(source, variables=SPECIAL_TOKENS)
    rendering = template.render_pieces(messages, tools, False, variables)
    check = make_check(source)
    if not (variables or unread_texts):
        return set(found_by(check, messages, tools, rendering, template))
    conversation = Conversation(messages, tools, variables)
    pieces = rendering.pieces if isinstance(rendering, RenderedPieces) else ()
    written = template.written_as_json
    return set(
        check.conservation.find_omissions(
            conversation, rendering.text, pieces, written, unread_texts
        ).kinds
    )


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


SHOWS_ALL = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}EXTRA<|end|>{% endfor %}"
WITHOUT_DEVELOPER = SHOWS_ALL.replace("in messages", "in messages if m.role != 'developer'")
ARGUMENTS = (
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} v1]"
    "{% for k, v in c.function.arguments.items() if v != 1 %}<{{ k }}>{{ v }}{% endfor %}"
    "{% endfor %}"
)
PARAMETERS = (
    "{% for t in tools or [] %}{{ t.function.name }} {{ t.function.description }}"
    "{% for k, p in t.function.parameters.properties.items() %}{{ k }} {{ p.type }}{% endfor %}"
    "{% endfor %}"
)
REFUSING = "{% if EXPRESSION %}{{ raise_exception('refused') }}{% endif %}"


def calling_with(**arguments: Any) -> dict[str, Any]:
    call = {"function": {"name": "measure_height", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


@pytest.mark.parametrize(
    ("source", "content"),
    [
        (WITHOUT_DEVELOPER, "user"),
        (WITHOUT_DEVELOPER, "end"),
        (WITHOUT_DEVELOPER.replace("EXTRA", ARGUMENTS), "building_name"),
        (WITHOUT_DEVELOPER.replace("EXTRA", ARGUMENTS), "1"),
        (WITHOUT_DEVELOPER.replace("EXTRA", "{{ m.mood }}"), "cheerful fellow"),
        ("{{ strftime_now('%d %B %Y') }}" + WITHOUT_DEVELOPER, "26 July 2024"),
        ("{{ bos_token }}" + WITHOUT_DEVELOPER, "<s>"),
        ("{{ persona }}" + WITHOUT_DEVELOPER, "Captain Nemo"),
        (PARAMETERS + WITHOUT_DEVELOPER, "integer"),
        (PARAMETERS + WITHOUT_DEVELOPER, "harbour_code"),
        ('{% set x = messages[0].content | tojson %}"user"' + WITHOUT_DEVELOPER, "user"),
    ],
)
def test_a_message_that_the_template_writes_for_another_reason_is_an_omission(
    source: str, content: str
) -> None:
    messages = [
        {"role": "developer", "content": content},
        {**QUESTION, "mood": "cheerful fellow"},
        calling_with(building_name="Roter Sand"),
    ]
    found = omitted_by(source, messages, tool_with(), {"persona": "Captain Nemo"})
    assert "message_not_shown" in found


@pytest.mark.parametrize("value", [1, "1", "user"])
@pytest.mark.parametrize("is_shown", [False, True])
def test_an_argument_that_is_left_out_because_of_its_value_is_an_omission(
    value: Any, is_shown: bool
) -> None:
    condition = "" if is_shown else f" if v != {value!r}"
    source = SHOWS_ALL.replace("EXTRA", ARGUMENTS.replace(" if v != 1", condition))
    found = omitted_by(source, [QUESTION, calling_with(count=value)])
    assert found == (set() if is_shown else {"argument_not_shown"})


@pytest.mark.parametrize("content", ["user", "1", "x", "end"])
@pytest.mark.parametrize("ending", ["", "user", "1", "x"])
def test_a_message_that_is_left_out_because_of_its_value_is_an_omission(
    content: str, ending: str
) -> None:
    messages = [{"role": "user", "content": content}, ANSWER]
    shown = SHOWS_ALL.replace("EXTRA", ending)
    dropped = shown.replace(
        "{{ m.content }}", f"{{% if m.content != '{content}' %}}{{{{ m.content }}}}{{% endif %}}"
    )
    assert omitted_by(shown, messages) == set()
    assert omitted_by(dropped, messages) == {"message_not_shown"}


@pytest.mark.parametrize(
    "expression",
    [
        "'zqx' in m.content",
        "m.content | length > 16",
        "m.tool_calls and m.tool_calls[0].function.name != 'measure_height'",
        "m.tool_calls and m.tool_calls[0].function.arguments.n > 10",
    ],
)
def test_a_template_that_refuses_sentinels_hides_no_omission(expression: str) -> None:
    refusing = REFUSING.replace("EXPRESSION", expression)
    names = "{% for c in m.tool_calls or [] %}[{{ c.function.name }} v1]{% endfor %}"
    source = WITHOUT_DEVELOPER.replace("EXTRA", refusing + names)
    messages = [{"role": "developer", "content": "user"}, QUESTION, calling_with(n=1)]
    assert omitted_by(source, messages) == {"message_not_shown", "argument_not_shown"}
    assert omitted_by(source, messages[1:]) == {"argument_not_shown"}
    messages[2] = {"role": "assistant", "content": "user"}
    assert omitted_by(source, messages[1:]) == set()


def test_a_message_that_is_escaped_within_another_one_is_an_omission() -> None:
    source = SHOWS_ALL.replace("in messages", "in messages if m.role != 'tool'")
    text = 'he said "hi" to me'
    messages = [QUESTION, {**RESULT, "content": text}, {**ANSWER, "content": json.dumps([text])}]
    assert omitted_by(source.replace("EXTRA", ""), messages) == {"message_not_shown"}


def test_arguments_that_are_converted_and_not_written_are_omissions() -> None:
    converted = "{% for c in m.tool_calls or [] %}{% set x = c.function.arguments | tojson %}"
    source = SHOWS_ALL.replace("EXTRA", converted + "[{{ c.function.name }}]{% endfor %}")
    messages = [{"role": "user", "content": '{"n": 1}'}, calling_with(n=1)]
    assert omitted_by(source, messages) == {"argument_not_shown"}


def test_an_unread_text_that_the_template_writes_by_itself_is_an_omission() -> None:
    part = {"type": "text", "text": "hi", "caption": "user"}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "ok"}]}
    messages = [{"role": "user", "content": [part]}, answer]
    parts = "{% for p in m.content %}{{ p.text }}{{ p.SHOWN }}{% endfor %}"
    source = SHOWS_ALL.replace("{{ m.content }}EXTRA", parts)
    for shown, expected in (("nothing", {"key_not_shown"}), ("caption", set())):
        found = omitted_by(source.replace("SHOWN", shown), messages, unread_texts=("user",))
        assert found == expected
    # Another text is in a key of a message, and the template writes it.
    hinted = [{**QUESTION, "hint": "look closely"}, ANSWER]
    source = SHOWS_ALL.replace("EXTRA", "{{ m.hint }}")
    found = omitted_by(source, hinted, unread_texts=("look closely", "user"))
    assert found == {"key_not_shown"}
    assert omitted_by(source, hinted, unread_texts=("look closely",)) == set()


@pytest.mark.parametrize("separators", [(", ", ": "), (",", ":")])
def test_arguments_as_json_text_fit_in_any_layout(separators: tuple[str, str]) -> None:
    text = json.dumps({"a": ":", "b": [",", 1]}, separators=separators)
    function = {"name": "measure_height", "arguments": text}
    turn = {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}
    written = "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments }}"
    source = SHOWS_ALL.replace("EXTRA", written + "{% endfor %}")
    assert omitted_by(source, [QUESTION, turn]) == set()


class Echo(Contents):
    """Contents that are words of the template's own text."""

    def __init__(self, words: list[str], seed: int) -> None:
        super().__init__("sentinels")
        self._words, self._random = words, random.Random(seed)

    def __call__(self, kind: str, *, number: bool = False, is_prose: bool = False) -> Any:
        pattern = r"\d{1,5}" if number else ".*" if is_prose or kind in TEXTS else "[A-Za-z_]{2,}"
        word = self._random.choice(
            [word for word in self._words if re.fullmatch(pattern, word)] or ["1"]
        )
        self.kinds.append(kind)
        self.values.append(int(word) if number else word)
        return self.values[-1]


TEXTS = set(OMISSION_KINDS) - {"call_not_shown", "tools_not_shown"}


@pytest.mark.parametrize("step", [16, pytest.param(1, marks=pytest.mark.slow)])
def test_contents_that_are_words_of_the_template_are_judged_like_sentinels(step: int) -> None:
    outcome = Outcome()
    for name, source in sorted(templates_of_trl().items())[::step]:
        template, check = ChatTemplate(source, variables=SPECIAL_TOKENS), make_check(source)
        for feature, make in features().items():
            expected = omitted_by_transformers(source, make)
            if expected is None:
                continue
            contents = Contents("sentinels")
            messages, tools = make(contents)
            own_text = template.render(messages, tools).text
            for value in sorted(map(str, contents.values), key=len, reverse=True):
                own_text = own_text.replace(value, " ")
            words = re.findall(r"[A-Za-z_]+|\d+|[^\w\s]+", own_text)
            words = sorted({word for word in words if "think" not in word}) or ["user"]
            for seed in range(2):
                messages, tools = json.loads(json.dumps(make(Echo(words, seed))))
                try:
                    rendering = template.render_pieces(messages, tools)
                except SftprepError:
                    continue
                found = found_by(check, messages, tools, rendering, template)
                outcome.add(f"{name}, {feature}, {seed}", found, expected)
    assert outcome.cases > 1000 / step
    assert outcome.differences == []
