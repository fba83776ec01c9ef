"""With a loss on the assistant only, the ids are those of the template that TRL trains with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from tests.sfttrain.tiny import tiny_model
from tests.sfttrain.trainer_factory import make_sft_trainer, sequences

trl = pytest.importorskip("trl", reason="compares with TRL")
templates = pytest.importorskip("trl.chat_template_utils")

pytestmark = pytest.mark.filterwarnings("ignore")

TOOL = {"type": "function", "function": {"name": "tide_table", "description": "High water"}}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(arguments: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "tide_table", "arguments": arguments}}]


THINKING = [
    {"messages": [user("a?"), assistant("<think>\nwhy\n</think>\n\nb."), user("c?"), last]}
    for last in (assistant("d"), assistant("<think>x</think>e</think>f"), assistant("</think>"))
]
CALLS = [
    {
        "messages": [
            user("When?"),
            assistant("", tool_calls=call(arguments)),
            {"role": "tool", "content": "14:05"},
            assistant("<think>so</think>At two."),
        ]
    }
    for arguments in ('{"harbour": "Husum"}', '{"harbour": "Büsum", "day": "today"}')
]
CALLS_WITH_OBJECTS = [
    {
        "messages": [
            user("When?"),
            assistant("", tool_calls=call({"harbour": "Büsum", "depth": 2.5})),
            {"role": "tool", "content": "14:05"},
            assistant("At two."),
        ]
    }
]
WITH_TOOLS = [
    {"messages": [user("When?"), assistant("At two.")], "tools": [TOOL]},
    {"messages": [user("Where?"), assistant("Here.")], "tools": [TOOL]},
]
CASES: dict[str, tuple[Any, list[Any]]] = {
    "reasoning of R1": (templates.deepseek_r1_distill_chat_template, THINKING),
    "arguments of DeepSeek-V3 as text": (templates.deepseekv3_chat_template, CALLS),
    "arguments of DeepSeek-V3 as objects": (templates.deepseekv3_chat_template, CALLS_WITH_OBJECTS),
    "a known template by the name default": (
        {"default": templates.cohere_chat_template, "tool_use": "{{ tools | tojson }}"},
        WITH_TOOLS,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_ids_are_those_of_the_template_that_trl_trains_with(
    case: str, model: Path, tmp_path: Path
) -> None:
    template, rows = CASES[case]
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    tokenizer.chat_template = template
    own = tiny_model("llama", vocab_size=600, max_position_embeddings=4096)
    settings = {"assistant_only_loss": True, "max_length": 512}
    ours = make_sft_trainer(
        own, tmp_path, rows, options={"processing_class": tokenizer}, **settings
    )
    theirs = trl.SFTTrainer(
        own,
        args=trl.SFTConfig(output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    expected = sorted(row["input_ids"] for row in theirs.train_dataset)
    assert [ids for ids, _ in sequences(ours.train_dataset)] == expected
    assert tokenizer.chat_template == template


def test_without_that_loss_the_template_is_the_tokenizers_own(model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    tokenizer.chat_template = templates.deepseek_r1_distill_chat_template
    own = tiny_model("llama", vocab_size=600, max_position_embeddings=4096)
    ours = make_sft_trainer(own, tmp_path, THINKING, options={"processing_class": tokenizer})
    texts = [tokenizer.decode(ids) for ids, _ in sequences(ours.train_dataset)]
    assert not any("why" in text for text in texts)
