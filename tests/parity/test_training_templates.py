"""`assistant_only_loss` gives the ids that TRL gives with its training templates."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from sfttrain import SFTConfig
from sfttrain.data.settings import DataSettings
from sfttrain.data.training_templates import to_training_template
from tests.parity.our_side import our_sequences
from tests.parity.test_trl import with_template
from tests.parity.trl_side import tokenizer_of, trl_sequences
from tests.support import needs_shared

pytest.importorskip("trl")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

QUICK = ("qwen3", "qwen3_6", "deepseek_r1_distill", "gptoss", "llama3")
OTHERS = (
    "cohere",
    "deepseekv3",
    "gemma3",
    "lfm2",
    "lfm2_v2",
    "muse_glimmer",
    "phi3",
    "phi3_5",
    "qwen2_5",
    "qwen3_5_nothink",
    "qwen3_5_think",
    "qwen3_8",
    "qwen3_instruct_2507",
    "nemotron_3_nano",
)


def thinking_chats() -> list[dict[str, Any]]:
    """Chats of one to four turns, with reasoning in tags in every answer."""
    words = [
        "the",
        "harbour",
        "of",
        "the",
        "small",
        "town",
        "had",
        "four",
        "boats",
        "and",
        "one",
        "long",
        "grey",
        "pier",
    ]
    rows = []
    for number in range(12):
        messages = []
        for turn in range(number % 4 + 1):
            question = " ".join(words[(number + turn) % 5 : (number * 3 + turn) % 8 + 6])
            thought = " ".join(words[turn : number % 9 + 4])
            messages += [
                {"role": "user", "content": f"{question}?"},
                {"role": "assistant", "content": f"<think>\n{thought}\n</think>\n\n{question}."},
            ]
        rows.append({"messages": messages})
    return rows


def check_ids(name: str, tmp_path: Path) -> None:
    rows, folder = thinking_chats(), with_template(name, tmp_path / "tokenizer")
    theirs = trl_sequences(rows, folder, tmp_path / "trl", max_length=512, assistant_only_loss=True)
    tokenizer = tokenizer_of(folder)
    args = SFTConfig(output_dir=str(tmp_path / "out"), assistant_only_loss=True, max_length=512)
    settings = DataSettings.from_config(args, tokenizer).build_settings(False)
    exported = Path(shutil.copytree(folder, tmp_path / "exported"))
    template = to_training_template(tokenizer.chat_template)
    assert isinstance(template, str)
    (exported / "chat_template.jinja").write_text(template, encoding="utf-8")
    ours = our_sequences(
        rows,
        exported,
        max_length=512,
        train_on="assistant",
        reasoning=settings["reasoning"],
        date="today",  # TRL's templates see the day of the run
    )
    assert [ids for ids, _ in ours] == [ids for ids, _ in theirs]


@needs_shared
@pytest.mark.parametrize("name", QUICK)
def test_ids_are_those_of_the_training_template(name: str, tmp_path: Path) -> None:
    check_ids(name, tmp_path)


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_ids_are_those_of_every_other_training_template(name: str, tmp_path: Path) -> None:
    check_ids(name, tmp_path)


@needs_shared
@pytest.mark.parametrize("name", ["qwen3", "qwen3_6"])
def test_the_trained_tokens_are_those_of_trl(name: str, tmp_path: Path) -> None:
    rows, folder = thinking_chats(), with_template(name, tmp_path / "tokenizer")
    theirs = trl_sequences(rows, folder, tmp_path / "trl", max_length=512, assistant_only_loss=True)
    ours = our_sequences(rows, folder, max_length=512, train_on="assistant", reasoning="keep")
    # TRL's marks include the newline after the end of a turn, which is not an answer.
    for (ids, trained), (same_ids, trained_by_trl) in zip(ours, theirs, strict=True):
        assert ids == same_ids
        more = [k for k, (a, b) in enumerate(zip(trained, trained_by_trl, strict=True)) if a != b]
        text = tokenizer_of(folder).decode([ids[k] for k in more])
        assert not text.strip()
        assert all(trained_by_trl[k] for k in more)
