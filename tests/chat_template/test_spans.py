"""Spans of turns: marked ones, derived ones, and their equality where a template has both."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftprep.chat_template.assistant_spans import (
    Unproven,
    derive_rule,
    find_marked_spans,
    find_turn_spans,
    is_assistant,
)
from sftprep.chat_template.reference.turn_tracking import Region, regions_of
from sftprep.chat_template.template import ChatTemplate
from sftprep.errors import TemplateError
from tests.chat_template.cases import OWN_TEMPLATES, TEMPLATES, VARIABLES, name_of
from tests.chat_template.template_table import (
    PAGE,
    TOOLS,
    call,
    page_with,
    table,
    talk,
    template_of,
)
from tests.support import needs_shared

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] +"
    " '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n'"
    " }}{% endif %}"
)
ORIGINALS = [path for path in [*TEMPLATES, *OWN_TEMPLATES] if "_training" not in path.name]
TWINS = [path for path in TEMPLATES if path.name.endswith("_training.jinja")]


def turning(source: str, backend: Any = "auto") -> ChatTemplate:
    return ChatTemplate(source, variables=VARIABLES, backend=backend, turns=True)


def assistant_texts(
    template: ChatTemplate, messages: list[dict[str, Any]], tools: Any = None
) -> list[str]:
    """Return the derived spans of the assistant's turns, as text."""
    rendered = template.render(messages, tools=tools)
    of = [number for number, message in enumerate(messages) if is_assistant(message)]
    return [
        rendered.text[a:b]
        for a, b, _ in find_turn_spans(rendered, messages, derive_rule(template), of)
    ]


# --- derived spans contain what the author of the turn wrote --------------------------------------

SPELLED = st.sampled_from(
    ["a", " ", "\n", "<|im_end|>", "<|im_start|>assistant\n", "user", "é", "{{"]
)
CONTENTS = st.lists(SPELLED, max_size=5).map("".join)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from(["user", "assistant"]), CONTENTS), min_size=1, max_size=6)
)
def test_a_span_is_its_content_and_its_end_whatever_other_turns_spell(turns):
    messages = [{"role": role, "content": content} for role, content in turns]
    for backend in ("auto", "jinja"):
        found = assistant_texts(turning(CHATML, backend), messages)
        assert found == [content + "<|im_end|>" for role, content in turns if role == "assistant"]


@needs_shared
@pytest.mark.parametrize("path", ORIGINALS, ids=name_of)
def test_the_turns_of_every_template_can_be_derived(path: Path):
    template, slow = template_of(path), template_of(path, backend="jinja")
    parts = "Still fine." not in _text(template, talk())
    messages = talk(parts=parts)
    spans = assistant_texts(template, messages)
    assert len(spans) in (2, 3)  # a third where something closes the conversation
    for content, span in zip(("Fine.", "Still fine."), spans, strict=False):
        assert content in span
        assert (span.endswith(content)) == (path.stem == "glm4moe")  # which ends no turn
        assert "How are you?" not in span
        assert "And now?" not in span
    assert template.render(messages) == slow.render(messages)


def _text(template: ChatTemplate, messages: list[dict[str, Any]]) -> str:
    try:
        return template.render(messages).text
    except TemplateError:
        return ""


# --- TRL's templates with marks -------------------------------------------------------------------

HEADERS = {  # what TRL marks before the assistant's own words, and the prompt writes at inference
    "deepseek_r1_distill": ("<｜Assistant｜>", "<｜tool▁outputs▁end｜>"),
    "deepseekv3": ("<｜Assistant｜>", "<｜tool▁outputs▁end｜>"),
    "gptoss": ("<|start|>assistant",),
    "muse_glimmer": ("<|start|>assistant",),
    "qwen2_5": ("\n",),
}
OTHER_TEXT = {"glm4moe", "qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6"}
"""Models whose second template writes a different text: it keeps the reasoning of earlier turns, or
it adds an end of turn."""


def conversations(parts: bool) -> list[tuple[list[dict[str, Any]], Any]]:
    plain = [talk(parts=parts), talk(reasoning=True, parts=parts), talk(parts=parts)[:2]]
    return [(messages, None) for messages in plain] + [
        (call({"city": "Wuhan"}), TOOLS),
        (call('{"city": "Wuhan"}'), TOOLS),
    ]


@needs_shared
@pytest.mark.parametrize("path", TWINS, ids=name_of)
def test_derived_spans_are_the_marks_of_the_second_template(path: Path):
    name = path.stem.removesuffix("_training")
    original, twin = template_of(path.with_name(f"{name}.jinja")), template_of(path, turns=False)
    rule = derive_rule(original)
    parts = "Still fine." not in _text(original, talk())
    compared = differing = 0
    for messages, tools in conversations(parts):
        try:
            ours, theirs = (
                original.render(messages, tools=tools),
                twin.render(messages, tools=tools),
            )
            of = [number for number, message in enumerate(messages) if is_assistant(message)]
            spans = [(a, b) for a, b, _ in find_turn_spans(ours, messages, rule, of)]
        except TemplateError:
            continue
        if ours.text != theirs.text:
            differing += 1
            continue
        compared += 1
        assert _covered(ours.text, spans) == _covered(
            ours.text, [_bare(ours.text, span, name) for span in theirs.spans]
        )
    assert (differing > 0) == (name in OTHER_TEXT or (name == "deepseekv3" and differing == 1))
    assert compared >= (0 if name in OTHER_TEXT else 3)


def _bare(text: str, span: tuple[int, int], name: str) -> tuple[int, int]:
    """Return a span of TRL without the whitespace at its end, and without a header."""
    first, last = span
    header = next((h for h in HEADERS.get(name, ()) if text.startswith(h, first)), "")
    return first + len(header), first + len(text[first:last].rstrip())


def _covered(text: str, spans: list[tuple[int, int]]) -> set[int]:
    """Return the characters in spans. Spans are compared by their characters, because a mark may
    consist of several parts."""
    return {at for first, last in spans for at in range(first, last)}


GOLDEN = {  # model: what is trained of the first answer here, and what TRL marks of it
    "gemma": ("Fine.<end_of_turn>", "Fine.<end_of_turn>\n"),
    "qwen2_5": ("Fine.<|im_end|>", "\nFine.<|im_end|>\n"),
    "deepseekv3": ("Fine.<｜end▁of▁sentence｜>", "<｜Assistant｜>Fine.<｜end▁of▁sentence｜>"),
    "gptoss": (
        "<|channel|>final<|message|>Fine.<|end|>",
        "<|start|>assistant<|channel|>final<|message|>Fine.<|end|>",
    ),
    "muse_glimmer": (
        " to=user<|message|>Fine.<|eot|>",
        "<|start|>assistant to=user<|message|>Fine.<|eot|>",
    ),
    "llama3": ("Fine.<|eot_id|>", "Fine.<|eot_id|>"),
    "nemotron_3_nano": ("<think></think>Fine.<|im_end|>", "<think></think>Fine.<|im_end|>\n"),
}


@needs_shared
@pytest.mark.parametrize("name", GOLDEN)
def test_derived_spans_differ_from_the_marks_of_trl_only_in_known_cases(name: str):
    paths = {path.stem: path for path in TEMPLATES}
    marked = template_of(paths[f"{name}_training"]).render(talk())
    first = marked.text[slice(*marked.spans[0])]
    assert (assistant_texts(template_of(paths[name]), talk())[0], first) == GOLDEN[name]


@needs_shared
def test_derived_spans_of_templates_without_marks_in_trl():
    paths = {name_of(path): path for path in ORIGINALS}
    found = {
        name: assistant_texts(template_of(paths[name]), talk())
        for name in ("llama3_1", "llama3_2", "smollm2", "mistral-v3")
    }
    assert found == {
        "llama3_1": ["Fine.<|eot_id|>", "Still fine.<|eot_id|>"],
        "llama3_2": ["Fine.<|eot_id|>", "Still fine.<|eot_id|>"],
        "smollm2": ["Fine.<|im_end|>", "Still fine.<|im_end|>"],
        "mistral-v3": [" Fine.</s>", " Still fine.</s>"],
    }
    llama = assistant_texts(template_of(paths["llama3_1"]), call({"city": "Wuhan"}), TOOLS)
    assert llama == [
        '{"name": "weather_of", "parameters": {"city": "Wuhan"}}<|eot_id|>',
        "It rains.<|eot_id|>",
    ]
    qwen = assistant_texts(template_of(paths["qwen3"]), talk(reasoning=True))
    assert qwen == ["Fine.<|im_end|>", "<think>\nSay so.\n</think>\n\nStill fine.<|im_end|>"]


# --- rejections -----------------------------------------------------------------------------------

EACH, END = "{% for m in messages %}", "{% endfor %}"
REFUSED = {
    "all at the end": (
        f"{{% set ns = namespace(t='') %}}{EACH}{{% set ns.t = ns.t + m.role + m.content"
        f" %}}{END}{{{{ ns.t }}}}"
    ),
    "one turn late": (
        f"{{% set ns = namespace(t='') %}}{EACH}{{{{ ns.t }}}}{{% set ns.t = m.role + ': ' +"
        f" m.content %}}{END}{{{{ ns.t }}}}"
    ),
    "each turn twice": (
        EACH
        + "{{ m.role + m.content + (messages[loop.index0 - 1].content if loop.index0 else '') }}"
        + END
    ),
    "in a macro": (
        "{% macro all() %}" + EACH + "{{ m.role + m.content }}" + END + "{% endmacro %}{{ all() }}"
    ),
    "no loop": "{{ messages | map(attribute='content') | join(' ') }}",
    "another header": (
        EACH
        + "{{ '[' + m.role + loop.index ~ ']' + m.content }}"
        + END
        + "{% if add_generation_prompt %}[assistant]{% endif %}"
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_whose_turns_cannot_be_proven_is_rejected(name: str):
    with pytest.raises(Unproven, match="assistant turns cannot be distinguished from the rest"):
        derive_rule(turning(REFUSED[name]))


def test_a_conversation_with_a_hidden_message_is_rejected():
    source = CHATML.replace(
        "message['content'] +", "message['content'] | replace('secret', '***') +"
    )
    template = turning(source)
    assert assistant_texts(template, talk()) == ["Fine.<|im_end|>", "Still fine.<|im_end|>"]
    hidden = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a secret"}]
    with pytest.raises(Unproven, match="message 2 is not written as it is in the record"):
        assistant_texts(template, hidden)


@needs_shared
def test_tools_are_rejected_for_a_template_that_writes_results_elsewhere():
    template = template_of({path.stem: path for path in TEMPLATES}["gemma4"])
    assert assistant_texts(template, talk()) == ["Fine.<turn|>", "Still fine.<turn|>"]
    with pytest.raises(Unproven, match="conversations with tools"):
        assistant_texts(template, call({"city": "Wuhan"}), TOOLS)


# --- turns ----------------------------------------------------------------------------------------


def test_regions_cover_the_text_and_follow_the_loops():
    source = (
        "<s>{% for m in messages %}{{ m.role }}{% for p in m.parts %}{{ p }}{% endfor %};{% endfor"
        " %}end"
    )
    messages = [{"role": "a", "parts": ["1", "2"]}, {"role": "b", "parts": []}]
    for backend in ("auto", "jinja"):
        rendered = turning(source, backend).render(messages)
        assert rendered.regions == (
            Region(0, 3, -1),
            Region(3, 7, 0),
            Region(7, 9, 1),
            Region(9, 12, -1),
        )


def test_rebuilt_messages_are_recognized_and_merged_ones_belong_to_the_first():
    source = (
        "{% set ns = namespace(all=[]) %}{% for m in messages %}"
        "{% set ns.all = ns.all + [{'role': m.role, 'content': m.content}] %}{% endfor %}"
        "{% for m in ns.all %}{{ m.content }};{% endfor %}"
    )
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "a"},
    ]
    assert [r.message for r in turning(source).render(messages).regions] == [0, 1, 2]
    merged = {"role": "user", "content": "a\n\nb"}
    two = [
        {"role": "user", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    marks = [(0, 0, merged), (4, 0, {"role": "assistant", "content": "c"}), (5, 0, None)]
    assert regions_of(marks, two, 5) == (Region(0, 4, 0), Region(4, 5, 2))


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 2), st.sampled_from([None, 0, 1, 2])),
        max_size=12,
    )
)
def test_regions_are_in_order_and_cover_the_text(steps):
    messages = [{"role": "user", "content": str(number)} for number in range(3)]
    marks, at = [], 0
    for step, depth, number in steps:
        at += step
        marks.append((at, depth, None if number is None else messages[number]))
    regions = regions_of(marks, messages, at + 2)
    assert [r.first for r in regions] == [0, *(r.last for r in regions[:-1])]
    assert regions[-1].last == at + 2
    assert all(r.first < r.last for r in regions)
    assert all(one.message != other.message for one, other in itertools.pairwise(regions))


def test_marked_spans_know_their_message():
    source = (
        "{% for m in messages %}{{ m.role }}:{% generation %}{{ m.content }}{% endgeneration %}{%"
        " endfor %}"
    )
    rendered = turning(source).render(talk())
    assert [(rendered.text[a:b], message) for a, b, message in find_marked_spans(rendered)] == [
        ("How are you?", 0), ("Fine.", 1), ("And now?", 2), ("Still fine.", 3)
    ]  # fmt: skip


@needs_shared
def test_the_table_in_the_docs_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page_with(table()), (
        "run python -m tests.chat_template.template_table"
    )
