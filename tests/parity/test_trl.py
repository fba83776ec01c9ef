"""Token for token what TRL trains on: ids and trained positions of every row, with both encoders
and both template ways."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import EXAMPLES
from tests.parity.cases import CASES, Case, alpaca_text, assistant, seed_task, user
from tests.parity.our_side import our_sequences
from tests.parity.trl_side import Sequence, trl_packed_sequences, trl_sequences
from tests.support import SHARED, needs_shared

pytest.importorskip("trl")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

WAYS = [("auto", "auto"), ("tokenizers", "jinja")]
TEMPLATES = SHARED / "tokenizers" / "_chat_templates_trl_1.16.0"
CHATS = ("qwen3", "smollm2", "mistral-v1", "mistral-v3", "deepseek-v4", "tiny-chatml-4k")
PLAIN = (*CHATS, "gpt2")
QUICK = {"qwen3": 24, "tiny-chatml-4k": 60, "smollm2": 30, "mistral-v3": 24, "gpt2": 60}
"""Rows of a file in the tests that run by default; those of the others, and all rows, with -m
slow."""


def assert_same(ours: list[Sequence], theirs: list[Sequence]) -> None:
    """The same sequences, as often; of those that differ, the first is shown around its first
    difference."""
    missing, extra = Counter(theirs) - Counter(ours), Counter(ours) - Counter(theirs)
    if missing or extra:
        one, other = next(iter(missing), ((), ())), next(iter(extra), ((), ()))
        pairs = zip(zip(*one, strict=True), zip(*other, strict=True), strict=False)
        at = next((k for k, (a, b) in enumerate(pairs) if a != b), 0)
        shown = [
            (side[0][max(0, at - 3) : at + 5], side[1][max(0, at - 3) : at + 5])
            for side in (one, other)
        ]
        pytest.fail(
            f"{missing.total()} of {len(theirs)} sequences of TRL are not ours, {extra.total()}"
            f" more are: at {at} {shown}"
        )


def compare(
    case: Case, tokenizer: str, limit: int | None, tmp_path: Path, max_length: int = 512
) -> None:
    theirs, ours = case.rows(limit)
    folder = SHARED / "tokenizers" / tokenizer
    expected = trl_sequences(theirs, folder, tmp_path / "trl", max_length=max_length, **case.trl)
    assert expected
    for encoder, way in WAYS:
        settings = {
            "max_length": max_length,
            "encoder": encoder,
            "template_backend": way,
            **case.settings,
        }
        assert_same(our_sequences(ours, folder, **settings), expected)


def pairs(tokenizers: Any) -> list[tuple[str, str]]:
    return [
        (name, tokenizer)
        for name, case in CASES.items()
        for tokenizer in tokenizers
        if tokenizer in (CHATS if case.chat else PLAIN) and tokenizer not in case.not_for
    ]


def some_of(name: str, tokenizer: str) -> bool:
    """By default each file meets the smallest tokenizer, and three of the larger ones in turn."""
    return (
        tokenizer == "tiny-chatml-4k"
        or list(CASES).index(name) % 4 == list(QUICK).index(tokenizer) % 4
    )


@needs_shared
@pytest.mark.parametrize(("name", "tokenizer"), [pair for pair in pairs(QUICK) if some_of(*pair)])
def test_the_start_of_every_file(name, tokenizer, tmp_path):
    compare(CASES[name], tokenizer, QUICK[tokenizer], tmp_path)


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize(("name", "tokenizer"), pairs(PLAIN))
def test_every_row_of_every_file(name, tokenizer, tmp_path):
    compare(CASES[name], tokenizer, None, tmp_path, 1024)


# --- masks of assistant turns ---------------------------------------------------------------------


def alternating(limit: int) -> list[dict[str, Any]]:
    """Conversations that begin with the user and alternate, as most templates with marks want
    them."""
    rows, _ = CASES["messages, languages"].rows(None)
    rows = [
        row
        for row in rows[::20]
        if [m["role"] for m in row["messages"]]
        == ["user", "assistant"] * (len(row["messages"]) // 2)
    ]
    return rows[:limit]


def with_template(name: str, folder: Path) -> Path:
    """A tokenizer that has all special tokens with one of TRL's templates."""
    source = SHARED / "tokenizers" / "smollm2"
    folder.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((source / file).read_bytes())
    (folder / "chat_template.jinja").write_bytes((TEMPLATES / f"{name}.jinja").read_bytes())
    return folder


MARKED = [
    "qwen3_training",
    "llama3_training",
    "gemma_training",
    "qwen2_5_training",
    "cohere2_training",
    "lfm2_2_5",
    "phi3_training",
]


def assert_same_assistant_turns(template, tmp_path):
    rows, folder = alternating(60), with_template(template, tmp_path / "tokenizer")
    theirs = trl_sequences(rows, folder, tmp_path / "trl", max_length=256, assistant_only_loss=True)
    for encoder, way in WAYS:
        settings = {
            "encoder": encoder,
            "template_backend": way,
            "max_length": 256,
            "train_on": "assistant",
        }
        assert_same(our_sequences(rows, folder, **settings), theirs)


@needs_shared
@pytest.mark.parametrize("template", MARKED)
def test_marked_assistant_turns(template, tmp_path):
    assert_same_assistant_turns(template, tmp_path)


@needs_shared
@pytest.mark.parametrize("template", ["llama3", "cohere", "cohere2"])
def test_derived_assistant_turns_are_those_of_the_template_that_trl_puts_in_its_place(
    template, tmp_path
):
    """Of the other models, TRL trains a line break or a header more;
    tests/chat_template/test_spans.py compares them all."""
    assert_same_assistant_turns(template, tmp_path)


@needs_shared
@pytest.mark.parametrize("template", ["llama3", "qwen3_training"])
def test_both_masks_together(template, tmp_path):
    rows = [
        {"prompt": row["messages"][:1], "completion": row["messages"][1:]}
        for row in alternating(60)
    ]
    folder = with_template(template, tmp_path / "tokenizer")
    theirs = trl_sequences(
        rows,
        folder,
        tmp_path / "trl",
        max_length=256,
        assistant_only_loss=True,
        completion_only_loss=True,
    )
    assert_same(our_sequences(rows, folder, max_length=256, train_on="assistant"), theirs)


@needs_shared
@pytest.mark.parametrize("template", ["qwen3", "qwen2_5"])
def test_an_example_a_turn_is_the_completion_of_what_came_before(template, tmp_path):
    rows, folder = alternating(40), with_template(template, tmp_path / "tokenizer")
    apart = [
        {"prompt": row["messages"][:k], "completion": row["messages"][k : k + 1]}
        for row in rows
        for k in range(1, len(row["messages"]), 2)
    ]
    theirs = trl_sequences(apart, folder, tmp_path / "trl", max_length=256)
    assert_same(our_sequences(rows, folder, max_length=256, expand_turns=True), theirs)


# --- other ways in --------------------------------------------------------------------------------


@needs_shared
def test_alpaca_without_a_chat_template(tmp_path):
    case = Case("alpaca_en_demo.jsonl", alpaca_text)
    compare(case, "gpt2", 60, tmp_path)


def seed_text(record):
    """A formatting function, for both sides."""
    return seed_task(record)["text"]


@needs_shared
def test_a_formatting_function(tmp_path):
    lines = (
        (SHARED / "datasets" / "self_instruct_seed_tasks.jsonl")
        .read_text(encoding="utf-8")
        .split("\n")[:60]
    )
    rows = [json.loads(line) for line in lines if line]
    folder = SHARED / "tokenizers" / "tiny-chatml-4k"
    kept = [{"instruction": row["instruction"], "instances": row["instances"]} for row in rows]
    theirs = trl_sequences(kept, folder, tmp_path / "trl", formatting=seed_text, max_length=256)
    assert_same(
        our_sequences(rows, folder, max_length=256, formatting_func=f"{__name__}:seed_text"), theirs
    )


TOKEN_ROWS = [
    {"input_ids": [5, 6, 7, 8, 9, 10], "labels": [-100, -100, 7, 8, -100, 10]},
    {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]},
    {"input_ids": [5] * 20, "labels": [-100] * 18 + [5, 5]},
]


@needs_shared
@pytest.mark.parametrize(
    "rows",
    [
        TOKEN_ROWS,
        [
            {"input_ids": r["input_ids"], "completion_mask": [int(x != -100) for x in r["labels"]]}
            for r in TOKEN_ROWS
        ],
        [
            {"input_ids": r["input_ids"], "assistant_masks": [int(x != -100) for x in r["labels"]]}
            for r in TOKEN_ROWS
        ],
        [{"input_ids": r["input_ids"]} for r in TOKEN_ROWS],
    ],
    ids=["labels", "completion_mask", "assistant_masks", "ids"],
)
def test_given_tokens(rows, tmp_path):
    folder = SHARED / "tokenizers" / "tiny-chatml-4k"
    only = {"completion_only_loss": True} if "completion_mask" in rows[0] else {}
    theirs = trl_sequences(rows, folder, tmp_path / "trl", max_length=16, **only)
    assert_same(our_sequences(rows, folder, max_length=16), theirs)


# --- lengths and packs ----------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize("side", ["right", "left"])
def test_which_end_is_cut(side, tmp_path):
    theirs, ours = CASES["question-answer"].rows(60)
    folder = SHARED / "tokenizers" / "tiny-chatml-4k"
    mode = {"right": "keep_start", "left": "keep_end"}[side]
    expected = trl_sequences(theirs, folder, tmp_path / "trl", max_length=64, truncation_mode=mode)
    settings = {"max_length": 64, "truncate_side": side, "map": "question=prompt,answer=completion"}
    assert_same(our_sequences(ours, folder, **settings), expected)


@needs_shared
@pytest.mark.parametrize("packing", ["bfd", "bfd_split"])
def test_what_packs_hold(packing, tmp_path):
    """All of it but sequences that train nothing, which TRL keeps where it packs (its first token
    is no target)."""
    theirs, ours = CASES["question-answer"].rows(80)
    folder = SHARED / "tokenizers" / "tiny-chatml-4k"
    packed = trl_packed_sequences(
        theirs, folder, tmp_path / "trl", max_length=64, packing_strategy=packing
    )
    wasted = [sequence for sequence in packed if not any(sequence[1][1:])]
    assert wasted
    settings = {"max_length": 64, "packing": packing, "map": "question=prompt,answer=completion"}
    assert_same(
        our_sequences(ours, folder, **settings),
        [sequence for sequence in packed if any(sequence[1][1:])],
    )


@pytest.mark.parametrize("name", ["chats", "qa"])
def test_the_examples_of_this_project(name, tokenizer_dir, tmp_path):
    path = EXAMPLES / "data" / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    theirs = trl_sequences(rows, tokenizer_dir, tmp_path / "trl", max_length=300)
    assert_same(our_sequences(rows, tokenizer_dir, max_length=300), theirs)


def test_rows_with_a_prompt_and_messages_are_conversations(tokenizer_dir, tmp_path):
    """TRL takes such rows, as those of UltraChat, for prompts without a completion, and fails;
    without the prompt it does not."""
    messages = [user("One?"), assistant("Two.")]
    with pytest.raises(KeyError, match="completion"):
        trl_sequences([{"prompt": "One?", "messages": messages}], tokenizer_dir, tmp_path / "a")
    theirs = trl_sequences([{"messages": messages}], tokenizer_dir, tmp_path / "b")
    assert_same(our_sequences([{"prompt": "One?", "messages": messages}], tokenizer_dir), theirs)
