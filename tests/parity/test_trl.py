"""Token for token what TRL trains on: ids and trained positions of every row, with both encoders and both template ways."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sftprep import BuildConfig, build, open_shards
from tests.conftest import EXAMPLES
from tests.parity.trl_side import Sequence, trl_sequences
from tests.support import SHARED, needs_shared

pytest.importorskip("trl")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

WAYS = [("auto", "auto"), ("tokenizers", "jinja")]


def our_sequences(path: Path, tokenizer_dir: Path, output: Path, **settings: Any) -> list[Sequence]:
    """Every sequence of a build, by origin."""
    build(BuildConfig.of(inputs=str(path), tokenizer=str(tokenizer_dir), output=str(output), **settings))
    found: dict[int, Sequence] = {}
    for pack in open_shards(output):
        at = 0
        for length, origin in zip(pack.seq_lengths.tolist(), pack.origin.tolist(), strict=True):
            found[origin] = (
                tuple(pack.input_ids[at : at + length].tolist()),
                tuple(pack.completion_mask[at : at + length].tolist()),
            )
            at += length
    return [found[origin] for origin in sorted(found)]


def written(rows: list[dict[str, Any]], path: Path) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def assert_same(ours: list[Sequence], theirs: list[Sequence]) -> None:
    """The same sequences, as often; of those that differ, the first is shown around its first difference."""
    missing, extra = Counter(theirs) - Counter(ours), Counter(ours) - Counter(theirs)
    if missing or extra:
        one, other = next(iter(missing), ((), ())), next(iter(extra), ((), ()))
        pairs = zip(zip(*one, strict=True), zip(*other, strict=True), strict=False)
        at = next((k for k, (a, b) in enumerate(pairs) if a != b), 0)
        shown = [(side[0][max(0, at - 3) : at + 5], side[1][max(0, at - 3) : at + 5]) for side in (one, other)]
        pytest.fail(
            f"{missing.total()} of {len(theirs)} sequences of TRL are not ours, {extra.total()} more are: at {at} {shown}"
        )


def read(name: str, limit: int) -> list[dict[str, Any]]:
    lines = (SHARED / "datasets" / name).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:limit] if line]


CASES = {
    # name: rows as TRL takes them, settings of TRL, settings of ours
    "text": (lambda: [{"text": row["answer"]} for row in read("gsm8k_train.jsonl", 150)], {}, {}),
    "prompt-completion": (
        lambda: [{"prompt": row["question"], "completion": row["answer"]} for row in read("gsm8k_train.jsonl", 150)],
        {},
        {},
    ),
    "prompt-completion, languages": (lambda: read("xquad_12lang_prompt_completion.jsonl", 720)[::6], {}, {}),
    "prompt-completion, all tokens": (
        lambda: [{"prompt": row["question"], "completion": row["answer"]} for row in read("gsm8k_train.jsonl", 60)],
        {"completion_only_loss": False},
        {"train_on": "all"},
    ),
    "code": (
        lambda: [{"prompt": r["prompt"], "completion": r["canonical_solution"]} for r in read("humaneval.jsonl", 120)],
        {},
        {},
    ),
    "messages": (lambda: [{"messages": row["messages"]} for row in read("chitchat_600_messages.jsonl", 100)], {}, {}),
    "messages, languages": (
        lambda: [{"messages": r["messages"]} for r in read("chatterbot_multilingual_messages.jsonl", 7000)[::60]],
        {},
        {},
    ),
    "conversational completion": (
        lambda: [
            {
                "prompt": [{"role": "user", "content": row["question"]}],
                "completion": [{"role": "assistant", "content": row["answer"]}],
            }
            for row in read("gsm8k_train.jsonl", 100)
        ],
        {},
        {},
    ),
    # Without fractions: on its way to TRL, `datasets` turns 0.6 into 0.6000000000000001. Ours keeps it.
    "tools": (
        lambda: [
            {"messages": r["messages"], "tools": r["tools"]}
            for r in read("bfcl_toolcall_messages.jsonl", 120)
            if not re.search(r"[0-9]\.[0-9]", json.dumps([r["messages"], r["tools"]]))
        ],
        {},
        {},
    ),
}
CHAT = {"messages", "messages, languages", "conversational completion", "tools"}
PAIRS = [
    (case, tokenizer)
    for case in CASES
    for tokenizer in ("qwen3", "smollm2", "mistral-v3", "gpt2", "tiny-chatml-4k")
    if not (case in CHAT and tokenizer == "gpt2")
    and not (case == "tools" and tokenizer in {"mistral-v3", "smollm2"})  # one needs call ids, the other shows no tools
]


@needs_shared
@pytest.mark.parametrize(("case", "tokenizer"), PAIRS)
def test_real_data(case, tokenizer, tmp_path):
    make, trl_settings, our_settings = CASES[case]
    rows, folder = make(), SHARED / "tokenizers" / tokenizer
    theirs = trl_sequences(rows, folder, tmp_path / "trl", max_length=512, **trl_settings)
    path = written(rows, tmp_path / "rows.jsonl")
    for number, (encoder, way) in enumerate(WAYS):
        ours = our_sequences(
            path, folder, tmp_path / f"o{number}", max_length=512, encoder=encoder, template_way=way, **our_settings
        )
        assert_same(ours, theirs)


@needs_shared
@pytest.mark.parametrize("template", ["qwen3_training", "llama3_training", "gemma_training", "qwen2_5_training"])
def test_marked_assistant_turns(template, tmp_path):
    source = SHARED / "tokenizers" / "_chat_templates_trl_1.16.0" / f"{template}.jinja"
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((SHARED / "tokenizers" / "qwen3" / name).read_bytes())
    (folder / "chat_template.jinja").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    turns = [{"messages": row["messages"]} for row in read("chatterbot_multilingual_messages.jsonl", 3000)[::25]]
    rows = [row for row in turns if [m["role"] for m in row["messages"]] == ["user", "assistant"] * (len(row["messages"]) // 2)]
    assert len(rows) > 50
    theirs = trl_sequences(rows, folder, tmp_path / "trl", max_length=256, assistant_only_loss=True)
    path = written(rows, tmp_path / "rows.jsonl")
    for number, (encoder, way) in enumerate(WAYS):
        settings = {"encoder": encoder, "template_way": way, "max_length": 256, "train_on": "assistant"}
        assert_same(our_sequences(path, folder, tmp_path / f"o{number}", **settings), theirs)


@pytest.mark.parametrize("name", ["chats", "qa"])
def test_the_examples_of_this_project(name, tokenizer_dir, tmp_path):
    path = EXAMPLES / "data" / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    theirs = trl_sequences(rows, tokenizer_dir, tmp_path / "trl", max_length=300)
    assert_same(our_sequences(path, tokenizer_dir, tmp_path / "o", max_length=300), theirs)
