"""Records of which a chat template of a real model drops a part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sftprep
from tests.support import SHARED, needs_shared

CASES = SHARED.parent / "cases" / "data"
pytestmark = [
    needs_shared,
    pytest.mark.skipif(not CASES.is_dir(), reason="the shared cases are absent"),
]


def build_case(name: str, tokenizer: str, output: Path, **settings: Any) -> sftprep.BuildReport:
    return sftprep.build(
        CASES / name,
        tokenizer=SHARED / "tokenizers" / tokenizer,
        output=output,
        workers=1,
        **settings,
    )


@pytest.mark.parametrize(
    ("name", "tokenizer", "kind", "line"),
    [
        ("01-developer-role.jsonl", "qwen3", "message_not_shown", 1),
        ("04-reasoning-key-not-shown.jsonl", "mistral-v3", "reasoning_not_shown", 1),
        ("04-reasoning-key-not-shown.jsonl", "smollm2", "reasoning_not_shown", 1),
        ("06-reasoning-of-earlier-turns.jsonl", "qwen3", "reasoning_not_shown", 1),
    ],
)
def test_a_loss_is_counted_with_its_line(
    name: str, tokenizer: str, kind: str, line: int, tmp_path: Path
) -> None:
    manifest = build_case(name, tokenizer, tmp_path / "out").manifest
    assert manifest.accounting.warnings[kind] >= 1
    assert manifest.locate_warning(kind) == (str(CASES / name), line)


@pytest.mark.parametrize("template", ["llama3_2", "gptoss"])
def test_text_alongside_a_call_is_counted(template: str, tmp_path: Path) -> None:
    source = SHARED / "tokenizers" / "_chat_templates_trl_1.16.0" / f"{template}.jinja"
    manifest = build_case(
        "09-text-beside-a-call.jsonl", "qwen3", tmp_path / "out", chat_template=source
    ).manifest
    assert manifest.accounting.warnings["text_with_call_not_shown"] >= 1


def test_no_reasoning_of_earlier_turns_is_lost_if_it_is_kept(tmp_path: Path) -> None:
    warnings = build_case(
        "06-reasoning-of-earlier-turns.jsonl",
        "qwen3",
        tmp_path / "out",
        reasoning="keep",
        train_on="assistant",
    ).manifest.accounting.warnings
    assert warnings == {}
