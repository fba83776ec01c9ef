"""Records of every format, and packs in a form that compares."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

from sftprep.shards.reader import Pack

Plain = tuple[list[int], list[bool], list[int], list[int]]


def plain(pack: Pack) -> Plain:
    """Ids, positions, mask and lengths of a pack as lists; its origins are told apart from those of
    builds, and are not here."""
    return (
        pack.input_ids.tolist(),
        pack.completion_mask.tolist(),
        pack.seq_lengths.tolist(),
        pack.position_ids.tolist(),
    )


def plains(packs: Iterable[Pack]) -> list[Plain]:
    """All of them."""
    return [plain(pack) for pack in packs]


def rows(format_name: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Records of a format, each with its number in it, from a word to some hundred."""
    draw = random.Random(f"{format_name} {seed}")

    def text(number: int) -> str:
        words = ["so", "it", "goes", "Hello.", "again", "日本", "x=1", "\n"]
        return f"{number}: " + " ".join(
            draw.choice(words) for _ in range(int(draw.lognormvariate(2.5, 1.0)) + 1)
        )

    def turns(number: int) -> list[dict[str, str]]:
        return [
            {"role": role, "content": text(number)}
            for _ in range(draw.randint(1, 2))
            for role in ("user", "assistant")
        ]

    made = {
        "text": lambda k: {"text": text(k)},
        "messages": lambda k: {"messages": turns(k)},
        "prompt-completion": lambda k: {"prompt": text(k), "completion": text(k)},
        "sharegpt": lambda k: {
            "conversations": [
                {"from": {"user": "human", "assistant": "gpt"}[t["role"]], "value": t["content"]}
                for t in turns(k)
            ]
        },
        "alpaca": lambda k: {
            "instruction": text(k),
            "input": text(k) if k % 2 else "",
            "output": text(k),
        },
        "tokens": lambda k: {
            "input_ids": [draw.randrange(3, 500) for _ in range(draw.randint(2, 60))]
        },
        "ultrachat": lambda k: {"prompt": text(k), "messages": turns(k)},
    }
    return [made[format_name](number) for number in range(count)]
