"""The data files as TRL takes them, beside how they are given to us: converted here by hand, apart
from our own converters."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.support import SHARED

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """file: read for both; theirs, ours: a row as TRL takes it and as we do (None: not used); chat:
    needs a template."""

    file: str
    theirs: Callable[[Row], Row | None]
    ours: Callable[[Row], Row] = field(default=lambda row: row)
    chat: bool = False
    trl: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    not_for: frozenset[str] = frozenset()
    step: int = 1

    def rows(self, limit: int | None) -> tuple[list[Row], list[Row]]:
        """Both sides' rows, at most `limit`, spread over the file where `step` says so."""
        text = (SHARED / "datasets" / self.file).read_text(encoding="utf-8")
        lines = [line for line in text.split("\n") if line.strip()]
        read = (
            [{"text": line} for line in lines]
            if self.file.endswith(".txt")
            else [json.loads(line) for line in lines]
        )
        step = self.step if limit is not None else 1
        pairs = [
            (made, self.ours(json.loads(json.dumps(row))))
            for row in read[::step][:limit]
            if (made := self.theirs(row))
        ]
        return [theirs for theirs, _ in pairs], [ours for _, ours in pairs]


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


def qa(row: Row) -> Row:
    return {"prompt": row["question"], "completion": row["answer"]}


def alpaca_chat(row: Row) -> Row:
    asked = row["instruction"] + (f"\n{row['input']}" if row.get("input") else "")
    return {"prompt": [user(asked)], "completion": [assistant(row["output"])]}


def alpaca_text(row: Row) -> Row:
    """The layout of Stanford's Alpaca."""
    beside = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
    context = ", paired with an input that provides further context" if row["input"] else ""
    prompt = (
        f"Below is an instruction that describes a task{context}. Write a response that"
        " appropriately completes the request.\n\n"
    )
    return {
        "prompt": f"{prompt}### Instruction:\n{row['instruction']}\n\n{beside}### Response:\n",
        "completion": row["output"],
    }


def sharegpt_turns(row: Row) -> list[Row]:
    names = {"human": "user", "gpt": "assistant", "system": "system", "observation": "tool"}
    turns: list[Row] = []
    for turn in row["conversations"]:
        if turn["from"] == "function_call":
            call = json.loads(turn["value"])
            turns.append(
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"type": "function", "function": call}],
                }
            )
        else:
            turns.append({"role": names[turn["from"]], "content": turn["value"]})
    return turns


def sharegpt(row: Row) -> Row:
    return {"messages": sharegpt_turns(row)}


def without_fractions(row: Row) -> bool:
    """On its way to TRL, `datasets` turns 0.6 into 0.6000000000000001, 8.854e-12 into 0: see
    tests/semantics/test_numbers.py."""
    return not re.search(r"[0-9]\.[0-9]|[0-9]e-", json.dumps(row))


def glaive(row: Row) -> Row | None:
    turns = sharegpt_turns(row)
    if not all(
        isinstance(call["function"]["arguments"], dict)
        for turn in turns
        for call in turn.get("tool_calls", ())
    ):
        return None
    # A column that the first row lacks is left out by `datasets`.
    made = {"messages": turns, "tools": json.loads(row["tools"]) or None}
    return made if without_fractions(made) else None


def bfcl(row: Row) -> Row | None:
    made = {"messages": row["messages"], "tools": row["tools"]}
    return made if without_fractions(made) else None


def joined_parts(row: Row) -> Row:
    return {
        "messages": [
            {"role": m["role"], "content": "".join(p["value"] for p in m["content"])}
            for m in row["messages"]
        ]
    }


def seed_task(row: Row) -> Row:
    return {"text": f"{row['instruction']}\n{row['instances'][0]['output']}"}


def first_turn(row: Row) -> Row | None:
    """The rest of a conversation as the completion of its first turn, where it has one."""
    messages = row["messages"]
    return {"prompt": messages[:1], "completion": messages[1:]} if len(messages) > 1 else None


NO_TOOLS = frozenset({"smollm2", "mistral-v1", "mistral-v3", "deepseek-v4"})
"""They show no tools, or ask for call ids, which these files lack, or for arguments as text, which
`datasets` does not keep."""

CASES = {
    "text": Case(
        "gsm8k_train.jsonl", lambda r: {"text": r["answer"]}, lambda r: {"text": r["answer"]}
    ),
    "text, wiki": Case("wiki_demo.txt", dict, step=3),
    "text, several languages": Case(
        "alpaca_zh_demo.jsonl", lambda r: {"text": r["output"]}, lambda r: {"text": r["output"]}
    ),
    "question-answer": Case(
        "gsm8k_train.jsonl", qa, settings={"map": "question=prompt,answer=completion"}
    ),
    "question-answer, test": Case("gsm8k_test.jsonl", qa, qa),
    "every token of both": Case(
        "gsm8k_train.jsonl",
        qa,
        qa,
        trl={"completion_only_loss": False},
        settings={"train_on": "all"},
    ),
    "twelve languages": Case("xquad_12lang_prompt_completion.jsonl", dict, step=12),
    "code": Case(
        "humaneval.jsonl",
        lambda r: {"prompt": r["prompt"], "completion": r["canonical_solution"]},
        settings={"map": "canonical_solution=completion"},
    ),
    "code, mbpp": Case(
        "mbpp.jsonl",
        lambda r: {"prompt": r["text"], "completion": r["code"]},
        settings={"map": "text=prompt,code=completion"},
    ),
    "instructions": Case(
        "torchtune_instruct_tiny.jsonl",
        lambda r: {"prompt": r["instruction"], "completion": r["response"]},
        settings={"map": "instruction=prompt,response=completion"},
    ),
    "alpaca": Case("alpaca_en_demo.jsonl", alpaca_chat, chat=True),
    "alpaca, Chinese": Case("alpaca_zh_demo.jsonl", alpaca_chat, chat=True),
    "alpaca, identity": Case("identity.jsonl", alpaca_chat, chat=True),
    "alpaca, torchtune": Case("torchtune_alpaca_tiny.jsonl", alpaca_chat, chat=True),
    "messages": Case(
        "chitchat_600_messages.jsonl", lambda r: {"messages": r["messages"]}, chat=True
    ),
    "messages, languages": Case(
        "chatterbot_multilingual_messages.jsonl",
        lambda r: {"messages": r["messages"]},
        chat=True,
        step=150,
    ),
    "messages in parts": Case(
        "v1_sft_demo.jsonl",
        joined_parts,
        lambda r: {
            "messages": [{"role": m["role"], "content": m["content"]} for m in r["messages"]]
        },
        chat=True,
    ),
    "a conversation as completion": Case(
        "chitchat_600_messages.jsonl", first_turn, lambda r: first_turn(r) or r, chat=True
    ),
    "sharegpt": Case("fastchat_dummy_conversation.jsonl", sharegpt, chat=True),
    "sharegpt, axolotl": Case("axolotl_conversation.jsonl", sharegpt, chat=True),
    "sharegpt, torchtune": Case("torchtune_chat_tiny.jsonl", sharegpt, chat=True),
    "sharegpt, tools": Case("glaive_toolcall_en_demo.jsonl", glaive, chat=True, not_for=NO_TOOLS),
    "sharegpt, tools, Chinese": Case(
        "glaive_toolcall_zh_demo.jsonl", glaive, chat=True, not_for=NO_TOOLS
    ),
    "tools": Case("bfcl_toolcall_messages.jsonl", bfcl, chat=True, not_for=NO_TOOLS),
}
