"""For any content of the messages, the text is that of transformers."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftprep.chat_template.reference.rendering import REASONING_KEYS
from sftprep.chat_template.template import ChatTemplate
from sftprep.errors import TemplateError
from tests.chat_template.cases import (
    OWN_TEMPLATES,
    TEMPLATES,
    TOOLS,
    VARIABLES,
    Case,
    Refused,
    by_transformers,
    name_of,
)
from tests.support import needs_shared

IMPORTANT = [
    "qwen3",
    "qwen3_training",
    "qwen2_5",
    "llama3_1",
    "gemma",
    "mistral-v3",
    "smollm2",
    "deepseekv3",
    "gptoss",
]

_fragments = st.sampled_from(
    [
        "</think>",
        "<think>",
        "\n",
        "\n\n",
        " ",
        "<tool_response>",
        "</tool_response>",
        "<|im_end|>",
        "{{ x }}",
        "{% if %}",
        "<b>",
        "a",
        "é",
    ]
)
_contents = st.one_of(
    st.lists(_fragments, max_size=6).map("".join),
    st.text(max_size=12),
    st.none(),
    st.lists(
        st.fixed_dictionaries(
            {"type": st.just("text"), "text": st.lists(_fragments, max_size=3).map("".join)}
        ),
        max_size=2,
    ),
)
_calls = st.lists(
    st.fixed_dictionaries(
        {"id": st.just("abcdef123"), "type": st.just("function")},
        optional={
            "function": st.fixed_dictionaries(
                {
                    "name": st.text(max_size=4),
                    "arguments": st.one_of(
                        st.text(max_size=4), st.dictionaries(st.text(max_size=3), _contents)
                    ),
                }
            )
        },
    ),
    max_size=2,
)
_messages = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "user", "assistant", "system", "tool"]),
            "content": _contents,
        },
        optional={
            "reasoning_content": _contents,
            "thinking": _contents,
            "tool_calls": _calls,
            "tool_call_id": st.just("abcdef123"),
        },
    ),
    max_size=6,
)


def _remove_empty_reasoning(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Remove empty reasoning where another key has some: unlike transformers, we show the other."""
    return [
        {key: value for key, value in m.items() if key not in REASONING_KEYS or value}
        if any(m.get(key) for key in REASONING_KEYS)
        else m
        for m in messages
    ]


_kwargs = st.fixed_dictionaries(
    {}, optional={"enable_thinking": st.booleans(), "date_string": st.text(max_size=3)}
)


@cache
def template(name: str, backend: Any) -> ChatTemplate:
    path = next(path for path in [*OWN_TEMPLATES, *TEMPLATES] if name_of(path) == name)
    return ChatTemplate(path.read_text(encoding="utf-8"), variables=VARIABLES, backend=backend)


@needs_shared
@pytest.mark.parametrize("name", IMPORTANT)
@settings(max_examples=60, deadline=None)
@given(
    messages=_messages,
    tools=st.sampled_from([None, None, TOOLS, []]),
    prompt=st.booleans(),
    kwargs=_kwargs,
)
def test_any_conversation_is_rendered_as_by_transformers(
    name: str, messages: list[Any], tools: Any, prompt: bool, kwargs: dict[str, Any]
) -> None:
    pieces = template(name, "auto")
    case = Case(_remove_empty_reasoning(messages), tools, kwargs)
    expected = by_transformers(
        pieces.source, case, add_generation_prompt=prompt, marks=pieces.has_generation_marks
    )
    try:
        done = pieces.render(
            messages, tools=tools, add_generation_prompt=prompt, template_kwargs=kwargs
        )
    except TemplateError:
        assert expected == Refused()
    else:
        assert (done.text, done.spans) == expected
    assert pieces.report()["mismatch"] is None


@needs_shared
@pytest.mark.parametrize("name", IMPORTANT)
@settings(max_examples=25, deadline=None)
@given(contents=st.lists(st.lists(_fragments, max_size=6).map("".join), min_size=1, max_size=7))
def test_alternating_turns_are_rendered_by_the_compiled_template(
    name: str, contents: list[str]
) -> None:
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": "-" + content}
        for i, content in enumerate(contents)
    ]
    pieces, slow = template(name, "auto"), template(name, "jinja")
    before = pieces.report()["renders"]["jinja"]
    assert pieces.render(messages) == slow.render(messages)
    assert pieces.report()["renders"]["jinja"] == before


@pytest.mark.parametrize(
    ("content", "roles"),
    [
        ("m.content[:10]", set()),
        ("m.content[0]", set()),
        ("m.content[:10]|tojson", set()),
        ("m.content|reverse|list|tojson", set()),
        ("m.content[0].text", {"user", "system", "assistant", "tool", "developer"}),
        ("m.content[0]['text']|tojson", {"user", "system", "assistant", "tool", "developer"}),
    ],
)
def test_contents_become_parts_only_where_a_template_reads_their_texts(
    content: str, roles: set[str]
) -> None:
    source = "{% for m in messages %}[{{ m.role }}]{{ " + content + " }}{% endfor %}"
    assert ChatTemplate(source, variables=VARIABLES).part_roles == roles
