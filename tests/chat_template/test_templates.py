"""Text, generation spans and rejections of both backends are those of transformers, for all known
templates."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from sftprep.chat_template.reference import rendering
from sftprep.chat_template.template import ChatTemplate
from sftprep.errors import TemplateError
from tests.chat_template.cases import (
    CONVERSATIONS,
    OWN_TEMPLATES,
    TEMPLATES,
    VARIABLES,
    Case,
    Refused,
    adversarial,
    by_transformers,
    name_of,
)
from tests.support import SHARED, needs_shared

# Without the real data the lists are empty, and pytest skips the tests for lack of parameters.
ALL = [pytest.param(path, id=name_of(path)) for path in [*TEMPLATES, *OWN_TEMPLATES]]


def by_us(template: ChatTemplate, case: Case, *, add_generation_prompt: bool) -> object:
    try:
        done = template.render(
            case.messages,
            tools=case.tools,
            add_generation_prompt=add_generation_prompt,
            template_kwargs=case.kwargs,
        )
    except TemplateError:
        return Refused()
    return done.text, done.spans


@needs_shared
def test_all_templates_are_there() -> None:
    assert len(TEMPLATES) == 72
    assert len(OWN_TEMPLATES) == 6


@needs_shared
@pytest.mark.parametrize("path", ALL)
def test_both_backends_give_the_text_and_spans_of_transformers(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    pieces, slow = (
        ChatTemplate(source, variables=VARIABLES),
        ChatTemplate(source, variables=VARIABLES, backend="jinja"),
    )
    rendered = 0
    for name, case in CONVERSATIONS.items():
        for prompt in (False, True):
            expected = by_transformers(
                source, case, add_generation_prompt=prompt, marks=pieces.has_generation_marks
            )
            before = copy.deepcopy(case)
            assert by_us(slow, case, add_generation_prompt=prompt) == expected, name
            assert by_us(pieces, case, add_generation_prompt=prompt) == expected, name
            assert case == before, "a render changed its input"
            rendered += expected != Refused()
    # Templates of vision models accept contents only as lists of parts: three conversations.
    assert rendered > (5 if "llava" in path.name else 20), "too few conversations are rendered"
    # A difference that the internal comparison found would be hidden, because Jinja takes over.
    assert pieces.report()["mismatch"] is None
    assert pieces.report()["renders"]["pieces"] > 0


@needs_shared
@pytest.mark.parametrize("path", ALL)
def test_adversarial_contents_are_rendered_as_by_transformers(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    pieces = ChatTemplate(source, variables=VARIABLES)
    for name, case in adversarial().items():
        expected = by_transformers(
            source, case, add_generation_prompt=True, marks=pieces.has_generation_marks
        )
        assert by_us(pieces, case, add_generation_prompt=True) == expected, name
    assert pieces.report()["mismatch"] is None


@needs_shared
@pytest.mark.parametrize("tokenizer", ["tiny-chatml-4k", "mistral-v3"])
def test_the_text_is_that_of_the_tokenizer(tokenizer: str) -> None:
    from transformers import AutoTokenizer

    real = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / tokenizer)
    template = ChatTemplate(real.chat_template, variables=real.special_tokens_map)
    for name in ("two turns", "system first", "calls", "tools and system", "null keys"):
        case = CONVERSATIONS[name]
        text = real.apply_chat_template(case.messages, tools=case.tools, tokenize=False)
        assert template.render(case.messages, tools=case.tools).text == text


@pytest.mark.parametrize("backend", ["auto", "jinja"])
def test_the_cost_of_a_long_conversation_is_linear(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size of the input, which limits the output, is measured a few times at most."""
    source = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    template = ChatTemplate(source, variables={}, backend=backend)  # type: ignore[arg-type]
    messages = [{"role": "user", "content": f"turn {k}"} for k in range(100_000)]
    calls: list[int] = []
    size_of = rendering.size_of
    monkeypatch.setattr(rendering, "size_of", lambda value: (calls.append(1), size_of(value))[1])
    text = template.render(messages).text
    assert len(text) > 1 << 20
    assert text.endswith("turn 99999\n")
    assert len(calls) < 10
