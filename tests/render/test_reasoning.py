"""Reasoning of earlier turns: kept as TRL's training templates keep it, removed, or not trained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftprep.chat_template.compiler.compilation import RenderedPieces
from sftprep.chat_template.template import ChatTemplate, Rendered, to_rendered
from sftprep.render.reasoning import (
    find_ends,
    find_insertions,
    insert_into_pieces,
    insert_into_text,
    without_reasoning,
)
from tests.semantics.prepared import prepare

trl = pytest.importorskip("trl")
FOLDER = Path(trl.__file__).parent / "chat_templates"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
KEEPING = ("qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6")
"""The templates whose variants in TRL keep the reasoning of earlier turns."""

# Shows the reasoning of the last turn, before its content, and ends the last turn in another way.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{{ '<|endoftext|>' if loop.last and m.role == 'assistant'"
    " else '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def template(name: str, *, turns: bool) -> ChatTemplate:
    source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return ChatTemplate(source, variables=TOKENS, turns=turns)


def keep(template: ChatTemplate, messages: list[dict[str, Any]]) -> tuple[Rendered, list[int]]:
    """Return the rendering with the reasoning of all turns, inserted in both forms."""
    made = template.render_pieces(messages)
    insertions, unproven = find_insertions(
        to_rendered(made),
        messages,
        lambda number: template.render(messages[:number]),
        find_ends(template.render),
    )
    if not insertions:
        return to_rendered(made), unproven
    kept = insert_into_text(to_rendered(made), insertions)
    assert isinstance(made, RenderedPieces)
    assert to_rendered(insert_into_pieces(made, insertions, lambda text: 0)) == kept
    return kept, unproven


def conversations() -> Iterator[list[dict[str, Any]]]:
    """Yield chats of one to four turns with reasoning in tags, under a key, or in every other turn,
    and chats with calls."""
    for turns in range(1, 5):
        for style in ("none", "tags", "key", "every other"):
            messages = []
            for number in range(turns):
                answer = {"role": "assistant", "content": f"Answer {number}."}
                thought = f"Thought {number}."
                if style == "key":
                    answer["reasoning_content"] = thought
                elif style == "tags" or (style == "every other" and number % 2):
                    answer["content"] = f"<think>\n{thought}\n</think>\n\n{answer['content']}"
                messages += [{"role": "user", "content": f"Question {number}?"}, answer]
            yield messages
    call = {"type": "function", "function": {"name": "look", "arguments": {"where": "Oslo"}}}
    calling = [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "Look."},
        {"role": "tool", "content": "found"},
        {"role": "assistant", "content": "There."},
    ]
    yield calling
    yield json.loads(json.dumps([*calling, *calling]))


@pytest.mark.parametrize("name", KEEPING)
def test_kept_reasoning_is_that_of_the_training_templates_of_trl(name: str) -> None:
    ours, theirs = template(name, turns=True), template(f"{name}_training", turns=False)
    for messages in conversations():
        kept, unproven = keep(ours, messages)
        assert kept.text == theirs.render(json.loads(json.dumps(messages))).text
        assert unproven == []


words = st.text("abc <>/\n", max_size=8)
turns = st.tuples(words, words.filter(lambda text: "</think>" not in text))


@given(st.lists(turns, min_size=1, max_size=5))
def test_without_the_insertions_the_text_is_that_of_the_template(
    turns: list[tuple[str, str]],
) -> None:
    messages: list[dict[str, Any]] = []
    for thought, answer in turns:
        messages.append({"role": "user", "content": "Hi"})
        messages.append({"role": "assistant", "content": answer, "reasoning_content": thought})
    chat = ChatTemplate(TEMPLATE, variables=TOKENS, turns=True)
    kept, unproven = keep(chat, messages)
    text = kept.text
    for number, (thought, _) in enumerate(turns[:-1]):
        if thought and 2 * number + 1 not in unproven:
            block = f"<think>{thought}</think>"
            assert block in text
            text = text.replace(block, "", 1)
    assert text == chat.render(messages).text


def test_the_end_of_an_earlier_turn_stays_the_same() -> None:
    chat = ChatTemplate(TEMPLATE, variables=TOKENS, turns=True)
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "im", "reasoning_content": "im"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Bye"},
    ]
    kept, unproven = keep(chat, messages)
    assert unproven == []
    assert kept.text == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>im</think>im<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nBye<|endoftext|>"
    )
    assert [kept.text[first:last] for first, last, _ in kept.regions][1] == (
        "<|im_start|>assistant\n<think>im</think>im<|im_end|>\n"
    )


def test_a_turn_that_is_written_differently_is_reported() -> None:
    source = TEMPLATE.replace("{{ m.content }}", "{{ m.content if loop.last else 'cut' }}")
    chat = ChatTemplate(source, variables=TOKENS, turns=True)
    messages = [
        {"role": "assistant", "content": "The answer", "reasoning_content": "Hm"},
        {"role": "user", "content": "Bye"},
    ]
    kept, unproven = keep(chat, messages)
    assert unproven == [0]
    assert kept.text == chat.render(messages).text


def test_a_conversation_of_many_turns_takes_a_bounded_time() -> None:
    chat = ChatTemplate(TEMPLATE, variables=TOKENS, turns=True)
    turn = {"role": "assistant", "content": "a", "reasoning_content": "b"}
    messages = [dict(turn) for _ in range(2000)]
    kept, unproven = keep(chat, messages)
    assert len(unproven) == 1999
    assert kept.text == chat.render(messages).text


# --- in a build -----------------------------------------------------------------------------------

CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello", "reasoning_content": "A greeting."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you"},
]


@pytest.mark.parametrize(
    ("reasoning", "trained"),
    [
        ("template", ["Hello<|im_end|>", "See you<|endoftext|>"]),
        ("keep", ["<think>A greeting.</think>Hello<|im_end|>", "See you<|endoftext|>"]),
        ("drop", ["Hello<|im_end|>", "See you<|endoftext|>"]),
    ],
)
def test_what_is_trained_in_each_mode(folder_with: Any, reasoning: str, trained: list[str]) -> None:
    made = prepare(
        [{"messages": CHAT}], folder_with(TEMPLATE), reasoning=reasoning, train_on="assistant"
    )
    assert made.trained() == trained
    warnings = {name for name in made.batch.counts if name.startswith("warnings.")}
    assert (
        warnings
        == {
            "template": {"warnings.reasoning_not_shown"},
            "keep": set(),
            "drop": {"warnings.reasoning_removed"},
        }[reasoning]
    )


def test_expand_is_the_same_as_expand_turns(folder_with: Any) -> None:
    one, other = (
        prepare([{"messages": CHAT}], folder_with(TEMPLATE), train_on="assistant", **settings)
        for settings in ({"reasoning": "expand"}, {"expand_turns": True})
    )
    assert [one.text(0), one.text(1)] == [other.text(0), other.text(1)]
    assert one.trained(0) == ["<think>A greeting.</think>Hello<|endoftext|>"]


def test_the_prompt_of_a_completion_is_kept_too(folder_with: Any) -> None:
    made = prepare(
        [{"prompt": CHAT[:3], "completion": CHAT[3:]}], folder_with(TEMPLATE), reasoning="keep"
    )
    assert "<think>A greeting.</think>Hello" in made.text()
    assert made.trained() == ["See you<|endoftext|>"]


@pytest.mark.parametrize("train_on", ["all", "assistant"])
def test_empty_blocks_of_reasoning_are_untrained_on_request(
    folder_with: Any, train_on: str
) -> None:
    source = TEMPLATE.replace("{{ m.content }}", "<think>\n\n</think>\n\n{{ m.content }}")
    settings = {"train_on": train_on, "reasoning": "drop"}
    for answer, block in (("yes", True), ("no", False)):
        made = prepare(
            [{"messages": CHAT}], folder_with(source), train_empty_thinking=answer, **settings
        )
        assert made.text().count("<think>\n\n</think>\n\n") == 4
        assert ("<think>" in "".join(made.trained())) == block
        assert "Hello<|im_end|>" in "".join(made.trained())


def test_reasoning_is_removed_from_keys_and_tags() -> None:
    for message in (
        {"role": "assistant", "content": "<think>\nTwo and two.\n</think>\n\nFour."},
        {"role": "assistant", "content": "Four.", "reasoning": "Two and two."},
        {"role": "assistant", "content": "Four."},
    ):
        assert without_reasoning(message) == {"role": "assistant", "content": "Four."}
    user = {"role": "user", "content": "What is </think>?"}
    assert without_reasoning(user) == user


def test_only_the_reasoning_is_removed_from_a_content() -> None:
    for content, rest in (
        ("<think>x</think>Close with </think> then go.", "Close with </think> then go."),
        ("x\n</think>\n\nGo.", "Go."),
        ("A\n<think>x</think>B", "A\nB"),
    ):
        message = {"role": "assistant", "content": content}
        assert without_reasoning(message)["content"] == rest


def test_empty_blocks_are_untrained_in_expanded_turns(folder_with: Any) -> None:
    source = TEMPLATE.replace("{{ m.content }}", "<think>\n\n</think>\n\n{{ m.content }}")
    made = prepare(
        [{"messages": CHAT}],
        folder_with(source),
        reasoning="expand",
        train_on="assistant",
        train_empty_thinking="no",
    )
    trained = "".join(text for number in range(len(made)) for text in made.trained(number))
    assert "<think>\n\n</think>" not in trained
    assert "Hello" in trained
