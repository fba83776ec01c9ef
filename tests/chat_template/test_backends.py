"""Backends of a template: their choice, the report, and the comparison with Jinja."""

from __future__ import annotations

import datetime
import json
import sys
from contextlib import suppress
from subprocess import run
from typing import Any

import pytest

from sftprep.chat_template import template as module
from sftprep.chat_template.compiler.compilation import RenderedPieces
from sftprep.chat_template.template import ChatTemplate, Rendered
from sftprep.errors import TemplateError
from tests.chat_template.cases import (
    CONVERSATIONS,
    OWN_TEMPLATES,
    TEMPLATES,
    VARIABLES,
    name_of,
    turns,
)
from tests.support import needs_shared

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% generation %}{{ m.content +"
    " '<|im_end|>' }}{% endgeneration %}\n{% endfor %}{% if add_generation_prompt"
    " %}<|im_start|>assistant\n{% endif %}"
)
MUST = {
    "qwen3",
    "qwen2_5",
    "llama3",
    "llama3_1",
    "gemma",
    "phi3",
    "smollm2",
    "mistral-v1",
    "mistral-v3",
    "tiny-chatml-4k",
    "deepseek-v4",
}


def chatml(**settings: Any) -> ChatTemplate:
    return ChatTemplate(CHATML, variables=VARIABLES, **settings)


@needs_shared
def test_all_templates_are_compiled() -> None:
    taken = set()
    for path in [*TEMPLATES, *OWN_TEMPLATES]:
        # Templates of vision models accept contents only as lists of parts, and have no tools.
        images = name_of(path).startswith(("llava", "idefics", "smolvlm"))
        names = (
            ["parts"]
            if images
            else ["two turns", "tools and system", "calls", "arguments as text", "results in a row"]
        )
        template = ChatTemplate(path.read_text(encoding="utf-8"), variables=VARIABLES)
        for case in (CONVERSATIONS[name] for name in names):
            before = template.report()["renders"]["jinja"]
            # Some templates expect tool calls in another form, and reject these.
            with suppress(TemplateError):
                template.render(case.messages, tools=case.tools)
                assert template.report()["renders"]["jinja"] == before, (
                    path,
                    template.report()["fallbacks"],
                )
                taken.add(name_of(path))
    assert taken >= MUST
    # In fact all of them: falling back to Jinja is a loss of speed, which must be noticed.
    assert taken == {name_of(path) for path in [*TEMPLATES, *OWN_TEMPLATES]}


def test_a_compiled_template_gives_the_text_and_spans_of_jinja() -> None:
    template = chatml()
    assert template.used_backend() == "pieces"
    assert template.has_generation_marks
    done = template.render(turns("hi", "hello"), add_generation_prompt=True)
    assert done.text == (
        "<|im_start|>user\nhi<|im_end|><|im_start|>assistant\nhello<|im_end|>"
        "<|im_start|>assistant\n"
    )
    assert [done.text[first:last] for first, last in done.spans] == [
        "hi<|im_end|>",
        "hello<|im_end|>",
    ]
    assert done == chatml(backend="jinja").render(turns("hi", "hello"), add_generation_prompt=True)
    assert chatml(backend="jinja").used_backend() == "jinja"


def test_a_single_conversation_can_fall_back_to_jinja() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{{ m.content if m.content is string else m.content | first }}{%"
        " endfor %}",
        variables={},
    )
    assert template.render(turns("a", "b")).text == "ab"
    assert template.used_backend() == "pieces"
    assert template.render(turns(["x", "y"])).text == "x"
    assert template.used_backend() == "mixed"
    report = template.report()
    assert report["fallbacks"] == {"the filter first (line 1)": 1}
    assert report["renders"] == {"pieces": 1, "jinja": 1, "checked": 1}
    assert json.loads(json.dumps(report)) == report


def test_a_rejection_has_the_message_of_the_template() -> None:
    source = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('must start with a user') }}{% endif"
        " %}{{ messages[1].content }}"
    )
    for backend in ("auto", "jinja"):
        template = ChatTemplate(source, variables={}, backend=backend)
        with pytest.raises(TemplateError, match="must start with a user") as caught:
            template.render([{"role": "system", "content": "x"}])
        assert caught.value.remedy
        with pytest.raises(TemplateError, match="UndefinedError"):
            template.render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("ok\n{% if %}", "line 2"),
        ("{{ 'a' | nonsense }}", "nonsense"),
        ("{% generation %}", "line 1"),
        ("{% generation %}{% break %}{% endgeneration %}", "does not compile"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "does not compile"),
    ],
)
def test_a_source_that_is_not_a_template_is_rejected(source: str, words: str) -> None:
    with pytest.raises(TemplateError, match=words) as caught:
        ChatTemplate(source, variables={})
    assert "chat_template" in caught.value.remedy


def test_a_template_that_cannot_be_compiled_is_run_by_jinja(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def too_deep(*_: Any, **__: Any) -> None:
        raise RecursionError("too deep")

    monkeypatch.setattr(module, "compile_pieces", too_deep)
    template = chatml()
    assert template.render(turns("a")).text == "<|im_start|>user\na<|im_end|>"
    assert template.used_backend() == "jinja"
    assert "too deep" in template.report()["why_jinja"]


@pytest.mark.parametrize("message", ["text", None, ["role"], 3])
def test_messages_that_are_not_objects_are_rejected(message: Any) -> None:
    with pytest.raises(TemplateError, match="message 2"):
        chatml().render([{"role": "user", "content": "a"}, message])


def test_tools_that_are_not_schemas_are_rejected() -> None:
    with pytest.raises(TemplateError, match="tool 1"):
        chatml().render(turns("a"), tools=[print])


@pytest.mark.parametrize(
    "name", ["messages", "tools", "chat_template", "continue_final_message", "tokenize"]
)
def test_kwargs_with_reserved_names_are_rejected(name: str) -> None:
    with pytest.raises(TemplateError, match=name):
        chatml().render(turns("a"), template_kwargs={name: 1})


def test_kwargs_hold_for_one_render_only() -> None:
    template = ChatTemplate(
        "{{ bos_token }}{{ mood }}{{ documents }}", variables={"bos_token": "<s>"}
    )
    assert template.render([]).text == "<s>None"
    assert (
        template.render(
            [], template_kwargs={"mood": "good", "bos_token": "B", "documents": ["d"]}
        ).text
        == "Bgood['d']"
    )
    assert template.render([]).text == "<s>None"


@pytest.mark.parametrize("backend", ["auto", "jinja"])
def test_kwargs_can_shadow_a_function(backend: Any) -> None:
    template = ChatTemplate(
        "{{ 1 if range is defined }}{{ strftime_now('%Y') if range is callable }}",
        variables={},
        backend=backend,
    )
    assert template.render([]).text == f"1{datetime.date.today().year}"
    assert template.render([], template_kwargs={"range": "r"}).text == "1"


@pytest.mark.parametrize("backend", ["auto", "jinja"])
def test_the_date_is_frozen(backend: Any) -> None:
    template = ChatTemplate(
        "{{ strftime_now('%d %B %Y %H:%M') }}",
        variables={},
        date=datetime.date(2024, 2, 29),
        backend=backend,
    )
    assert template.render([]).text == "29 February 2024 00:00"
    today = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}", variables={}, backend=backend)
    assert abs(
        datetime.date.fromisoformat(today.render([]).text) - datetime.date.today()
    ) <= datetime.timedelta(days=1)


def test_reasoning_is_available_under_each_name_and_the_record_is_unchanged() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m | tojson }}{% endfor %}", variables={})
    message = {"role": "assistant", "content": "a", "reasoning": "r"}
    text = template.render([message]).text
    assert (
        text == '{"thinking": "r", "role": "assistant", "content": "a", "reasoning": "r",'
        ' "reasoning_content": "r"}'
    )
    assert message == {"role": "assistant", "content": "a", "reasoning": "r"}


def test_the_first_renders_and_later_samples_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHECKED_FIRST", 3)
    monkeypatch.setattr(module, "CHECKED_EVERY", 10)
    template = chatml()
    for _ in range(30):
        template.render(turns("a", "b"))
    assert template.report()["renders"] == {"pieces": 30, "jinja": 0, "checked": 3 + 3}
    template.render(turns("a", "b", "c"))  # another shape
    assert template.report()["renders"]["checked"] == 7


@pytest.mark.parametrize(
    "wrong",
    [
        RenderedPieces("other text", ["other text"], 0, [], [], []),
        RenderedPieces("<|im_start|>user\na<|im_end|>", ["<", "rest"], 0, [0, 0, 1, 0], [], []),
    ],
)
def test_a_difference_disables_the_compiled_template(wrong: RenderedPieces) -> None:
    template = chatml()
    right = chatml(backend="jinja").render(turns("a"))
    assert template.used_backend() == "pieces"  # compiles it
    template._compiled = lambda *_: wrong  # a compiler with a fault
    assert template.render(turns("a")) == right
    assert template.render(turns("a")) == right
    report = template.report()
    assert report["mismatch"] == {"render": 1, "messages": 1}
    assert report["possible"] == "jinja"
    assert "differed" in report["why_jinja"]
    assert report["renders"]["jinja"] == 1


def test_a_text_where_jinja_rejects_disables_the_compiled_template() -> None:
    template = ChatTemplate("{{ raise_exception('no') }}", variables={})
    assert template.used_backend() == "pieces"  # compiles it
    template._compiled = lambda *_: RenderedPieces(
        "yes", ["yes"], 0, [], [], []
    )  # a compiler with a fault
    with pytest.raises(TemplateError, match="no"):
        template.render([])
    assert template.report()["mismatch"] is not None


def test_the_digest_is_of_the_source() -> None:
    assert chatml().digest == chatml(backend="jinja").digest
    assert chatml().digest != ChatTemplate(CHATML + " ", variables={}).digest
    assert len(chatml().digest) == 64


def test_rendered_is_immutable() -> None:
    assert Rendered("a", ((0, 1),)) == Rendered("a", ((0, 1),))
    with pytest.raises(AttributeError):
        Rendered("a", ()).text = "b"  # type: ignore[misc]


def test_no_heavy_library_is_imported() -> None:
    script = (
        "import sys, sftprep.chat_template.template;"
        " print({'torch', 'transformers', 'numba', 'pyarrow'} & set(sys.modules))"
    )
    done = run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
