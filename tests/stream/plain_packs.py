"""Random records of every format, and packs as lists that can be compared."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

from sftprep.shards.reading.pack import Pack

Plain = tuple[list[int], list[bool], list[int], list[int]]


def plain(pack: Pack) -> Plain:
    """Return ids, mask, lengths and positions of a pack as lists.

    Origins are left out, since those of streams differ from those of builds.
    """
    return (
        pack.input_ids.tolist(),
        pack.completion_mask.tolist(),
        pack.seq_lengths.tolist(),
        pack.position_ids.tolist(),
    )


def plains(packs: Iterable[Pack]) -> list[Plain]:
    """Return all packs as `plain` does."""
    return [plain(pack) for pack in packs]


def rows(format_name: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return random records of a format; each contains its number and 1 to some 100 words."""
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
        "question/answer": lambda k: {"question": text(k), "answer": text(k)},
        "tokens": lambda k: {
            "input_ids": [draw.randrange(3, 500) for _ in range(draw.randint(2, 60))]
        },
        "ultrachat": lambda k: {"prompt": text(k), "messages": turns(k)},
    }
    return [made[format_name](number) for number in range(count)]
