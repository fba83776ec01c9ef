"""`reasoning="drop"`: reasoning in tags is removed and counted, or counted as left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sftprep.chat_template.reasoning_tags import find_blocks
from tests.semantics.conftest import CHATML
from tests.semantics.prepared import Prepared, prepare
from tests.support import at_most

REMOVED, LEFT = "warnings.reasoning_removed", "warnings.reasoning_left"


def answered(folder_with: Callable[[str], Path], content: str, **settings: Any) -> Prepared:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": content}]
    return prepare([{"messages": turns}], folder_with(CHATML), reasoning="drop", **settings)


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        ("<think>so</think>\n\nYes.", "Yes."),
        ("<thinking>so</thinking>Yes.", "Yes."),
        ("so\n</thinking>\nYes.", "Yes."),
        ("<think>a</think> <think>b</think> Yes.", "Yes."),
        ("Yes.\n<thinking>so</thinking> No.", "Yes.\nNo."),
        ("<think>a <think>b</think> c</think> Yes.", "Yes."),
        ("<think>\na\n<think>\nb\n</think>\nc\n</think>\n\nYes.", "Yes."),
        ("<think>a <think>b</think> Yes.", "Yes."),
        ("<think>\nI open <think> now.\n</think>\n\nYes.", "Yes."),
        ("<think>I close with `</think>` now.</think>Yes.", "Yes."),
        ('<think>He said "a"</think>"Yes."', '"Yes."'),
        ("I use `</think>` here.\n</think>\nYes.", "Yes."),
    ],
)
def test_reasoning_in_tags_is_removed_and_counted(
    folder_with: Any, content: str, kept: str
) -> None:
    made = answered(folder_with, content)
    assert made.text().endswith(f"assistant\n{kept}<|im_end|>\n")
    assert (made.batch.counts[REMOVED], LEFT in made.batch.counts) == (1, False)


@pytest.mark.parametrize(
    "content", ["<think>abc</think>", "<think>abc", " <thinking>abc", "a\n</think> "]
)
def test_an_answer_that_is_only_reasoning_is_an_empty_target(
    folder_with: Any, content: str
) -> None:
    made = answered(folder_with, content)
    assert made.text().endswith("assistant\n<|im_end|>\n")
    assert made.batch.counts[REMOVED] == 1
    assert made.batch.counts["warnings.empty_target"] == 1
    (rejected,) = answered(folder_with, content, on_bad_record="quarantine").batch.rejected
    assert (rejected.reason, "message 2" in rejected.message) == ("empty_target", True)


def test_an_answer_with_reasoning_under_a_key_only_is_counted_once(folder_with: Any) -> None:
    answer = {"role": "assistant", "content": "", "reasoning_content": "so"}
    row = {"messages": [{"role": "user", "content": "q"}, answer]}
    counts = prepare([row], folder_with(CHATML), reasoning="drop").batch.counts
    assert (counts[REMOVED], counts["warnings.empty_target"]) == (1, 1)


MENTIONS = [
    "The tag <think> starts it.",
    "Use the </think> tag to end.",
    "Close it with </think>",
    "A tag `<think>` starts it and `</think>` ends it.",
    "`<think>` starts it and `</think>` ends it.",
    "Write <think> and </think> around it.",
    "<think> starts it.\n".join(["Here, ", "Also "]) + "So be it.",
    "For example:\n```\n<think>\nWhy?\n</think>\nSo.\n```\nDone.",
    "It ends with\n```\n</think>\n```\nDone.",
]


@pytest.mark.parametrize("content", MENTIONS)
def test_a_text_that_mentions_tags_is_left_and_counted(folder_with: Any, content: str) -> None:
    made = answered(folder_with, content)
    assert f"assistant\n{content}<|im_end|>" in made.text()
    assert (made.batch.counts[LEFT], REMOVED in made.batch.counts) == (1, False)


@pytest.mark.parametrize("content", MENTIONS)
def test_a_completion_that_mentions_tags_is_left_and_counted(
    tokenizer_dir: Path, content: str
) -> None:
    made = prepare([{"prompt": "q ", "completion": content}], tokenizer_dir, reasoning="drop")
    assert made.text() == f"q {content}<|im_end|>"
    assert (made.batch.counts[LEFT], REMOVED in made.batch.counts) == (1, False)


@pytest.mark.parametrize("content", MENTIONS)
def test_an_answer_after_reasoning_may_mention_tags(folder_with: Any, content: str) -> None:
    text = answered(folder_with, f"<think>\nso\n</think>\n\n{content}").text()
    assert f"assistant\n{content}<|im_end|>" in text


def test_many_tags_take_linear_time() -> None:
    for part in (
        "<think>",
        "\n<think>\n",
        "</think>",
        "<think>a</think>b\n",
        "\n<think>\na</think>",
    ):
        with at_most(5):
            find_blocks(part * 50_000)


@pytest.mark.parametrize(
    ("prompt", "completion", "text"),
    [
        ("q ", "<think>so</think>Yes.", "q Yes."),
        ("q <think>\n", "so\n</think>\nYes.", "q Yes."),
        ("q ", "<thinking>so</thinking>Yes.", "q Yes."),
        ("q <think> ", "Yes.", "q <think> Yes."),
    ],
)
def test_reasoning_of_a_plain_completion_is_removed(
    tokenizer_dir: Path, prompt: str, completion: str, text: str
) -> None:
    row = {"prompt": prompt, "completion": completion}
    made = prepare([row], tokenizer_dir, reasoning="drop")
    assert made.text() == f"{text}<|im_end|>"
    assert made.batch.counts.get(REMOVED, 0) == (completion != "Yes.")
    assert prepare([row], tokenizer_dir).text() == f"{prompt}{completion}<|im_end|>"


def test_a_plain_completion_of_reasoning_only_is_an_empty_target(tokenizer_dir: Path) -> None:
    rows = [{"prompt": "q", "completion": "<think>so"}, {"prompt": "q", "completion": "a"}]
    counts = prepare(rows, tokenizer_dir, reasoning="drop").batch.counts
    assert (counts[REMOVED], counts["warnings.empty_target"]) == (1, 1)


def test_reasoning_in_a_text_without_turns_is_counted_as_left(tokenizer_dir: Path) -> None:
    rows = [{"text": "User: q <think>so</think> Yes."}, {"text": "I think so."}]
    made = prepare(rows, tokenizer_dir, reasoning="drop")
    assert made.text() == "User: q <think>so</think> Yes.<|im_end|>"
    assert made.batch.counts[LEFT] == 1
    assert LEFT not in prepare(rows, tokenizer_dir).batch.counts
