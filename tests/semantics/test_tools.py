"""Tools and their calls in templates that expect another form, or show none."""

from __future__ import annotations

import json
from itertools import product

import pytest

from tests.semantics.conftest import CHATML
from tests.semantics.prepared import prepare
from tests.support import SHARED, needs_shared

TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALLING = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role +"
    " '\n' }}{{ 'thought' if '</think>' in m.content }}{{ m.content }}{% for c in m.tool_calls or"
    " [] %}[{{ c.function.name }} {{ c.function.arguments | items | list }}]{% endfor"
    " %}<|im_end|>\n{% endfor %}"
)
"""A template that fails on missing content, as Qwen3's does, and on arguments that are text."""


def call(arguments, **more):
    return {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}],
        **more,
    }


@pytest.mark.parametrize("train_on", ["all", "assistant"])
@pytest.mark.parametrize(("content", "as_text"), [*product([{}, {"content": None}], [False, True])])
def test_calls_without_content_are_rendered_as_with_empty_content(
    folder_with, content, as_text, train_on
):
    arguments = '{"a": 1}' if as_text else {"a": 1}
    rows = [
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                call(arguments, **more),
                {"role": "tool", "content": "2"},
            ]
        }
        for more in (content, {"content": ""})
    ]
    made = prepare(rows, folder_with(CALLING), train_on=train_on)
    assert made.batch.rejected == []
    assert made.text(0) == made.text(1)
    assert "[f [('a', 1)]]" in made.text(0)
    assert made.trained(0) == made.trained(1)


def test_keys_that_are_null_are_not_passed_to_the_template(folder_with):
    """As in TRL, because `apply_chat_template` removes them. The alternative forms of the messages
    come later."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    )
    rows = [{"messages": [{"role": "user", "content": "Hi"}, call({}, content=None)]}]
    assert "assistant <|im_end|>" in prepare(rows, folder_with(template)).text()


def test_a_rejection_reports_the_error_of_the_unchanged_record(folder_with):
    template = "{{ raise_exception('is defined: ' ~ (messages[0].content is defined)) }}"
    (rejected,) = prepare(
        [{"messages": [call({"a": 1}, content=None)]}], folder_with(template)
    ).batch.rejected
    assert rejected.message.endswith("is defined: False")


def test_tools_that_the_template_does_not_show_are_counted(folder_with):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    rows = [
        {"messages": chat, "tools": [TOOL]},
        {"messages": chat, "tools": []},
        {"messages": chat},
    ]
    assert prepare(rows, folder_with(CHATML)).batch.counts["warnings.tools_not_shown"] == 1
    assert "warnings.tools_not_shown" not in prepare(rows, folder_with(CALLING)).batch.counts
    mentioned = "{# tools #}the tools: {{ messages[0].tools }}"
    assert prepare(rows, folder_with(mentioned)).batch.counts["warnings.tools_not_shown"] == 1


def test_a_special_token_that_the_tokenizer_lacks_is_named(folder_with):
    row = {"messages": [{"role": "user", "content": "Hi"}]}
    (rejected,) = prepare(
        [row], folder_with("{{ bos_token + messages[0].content }}")
    ).batch.rejected
    assert (
        "the tokenizer has no such token, and the template writes its bos_token" in rejected.message
    )
    (rejected,) = prepare(
        [row], folder_with("{{ other_name + messages[0].content }}")
    ).batch.rejected
    assert "no such token" not in rejected.message


@needs_shared
@pytest.mark.parametrize(("name", "counted"), [("qwen3", False), ("deepseek-v4", True)])
def test_real_templates_show_tools_or_count_them(name, counted):
    row = {
        "messages": [{"role": "user", "content": "Hi"}, call(json.dumps({"a": 1}), content=None)],
        "tools": [TOOL],
    }
    made = prepare([row], SHARED / "tokenizers" / name)
    assert made.batch.rejected == []
    assert ("warnings.tools_not_shown" in made.batch.counts) == counted
    assert ('"name": "f"' in made.text()) != counted
