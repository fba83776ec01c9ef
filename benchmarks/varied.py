"""Chats without repeated contents, for benchmarks in which a cache of texts would be too effective.

    python -m benchmarks.varied chats.jsonl --megabytes 120
    python -m benchmarks.varied short.jsonl --megabytes 60 --lengths short

How a record is made, from the sentences of real data:
1. Its kind is drawn: chat in English (62 %), chat in another language (16 %), code (10 %),
   reasoning between <think> tags (6 %) or a tool call with its definitions (6 %).
2. Its length is drawn: `chats` from the lengths of 17,671 ShareGPT conversations (tokens, taken as
   four bytes each), `short` around 220 bytes. One fifth of it goes to the user's turns.
3. Each turn is filled with sentences, each of which is the first part of one sentence of the data
   and the last part of another. Only the definitions of tools are repeated in full.

The data are the folder `shared/data` next to the checkout (17 MB) or, where it does not exist, the
small data in `examples/data`; the corpus is the same for the same data, size and seed.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "data"
KINDS = {"english": 62, "other languages": 16, "code": 10, "reasoning": 6, "tools": 6}
_SENTENCE = re.compile(r"[^.!?。！？\n]+[.!?。！？\n]*\s*")
_BYTES_PER_TOKEN = 4
_SHORT_BYTES = 220
_MEMORY_OF_CONTENTS = 1 << 22  # contents whose hashes are kept, to state how many are distinct


@dataclass(kw_only=True)
class Material:
    """Parts of which records are made: the sentences of each language, and tool records."""

    english: list[str] = field(default_factory=list)
    languages: list[list[str]] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)


def write_varied(path: Path, megabytes: float, *, lengths: str = "chats", seed: int = 0) -> str:
    """Write a corpus of chats as JSON Lines, and return its description in one line.

    Args:
        path: The file to write.
        megabytes: The size of the file in 10^6 bytes, which the last record reaches.
        lengths: "chats" (ShareGPT) or "short" (about 220 bytes of text in each record).
        seed: The seed of all draws.
    """
    draw = random.Random(seed)
    material, origin = _material()
    sizes = _sizes(lengths, draw)
    written = records = contents = 0
    distinct: set[int] = set()
    with open(path, "w", encoding="utf-8") as file:
        while written < megabytes * 1e6:
            record = _record(material, next(sizes), draw, short=lengths == "short")
            line = json.dumps(record, ensure_ascii=False) + "\n"
            file.write(line)
            written += len(line.encode())
            records += 1
            for message in record["messages"]:
                contents += 1
                if len(distinct) < _MEMORY_OF_CONTENTS:
                    distinct.add(hash(message["content"]))
    return (
        f"{records:,} chats, {written / 1e6:.1f} MB, recombined from the sentences of {origin};"
        f" {len(distinct) / contents:.2%} of the {contents:,} contents are distinct"
    )


def _record(material: Material, size: int, draw: random.Random, *, short: bool) -> dict[str, Any]:
    """Return one chat of about `size` bytes of text."""
    (kind,) = draw.choices(list(KINDS), weights=list(KINDS.values()))
    if kind == "tools":
        return _tool_record(material, draw)
    pool = {
        "code": material.code,
        "other languages": draw.choice(material.languages) if material.languages else [],
    }.get(kind) or material.english
    exchanges = 1 if short else min(12, 1 + int(draw.expovariate(1 / 2.5)))
    messages = []
    if draw.random() < 0.2:
        messages.append({"role": "system", "content": _text(pool, 60, draw)})
    for _ in range(exchanges):
        share = size / exchanges * draw.uniform(0.5, 1.5)
        messages.append({"role": "user", "content": _text(pool, share / 5, draw)})
        answer = _text(pool, share * 4 / 5, draw)
        if kind == "reasoning":
            answer = f"<think>\n{_text(pool, share * 2 / 5, draw)}\n</think>\n\n{answer}"
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages}


def _tool_record(material: Material, draw: random.Random) -> dict[str, Any]:
    """Return a tool call, its result and an answer, with the definitions of a real record.

    Arguments and definitions are JSON strings, because the `datasets` library, with which the peer
    reads, gives every row of a column the keys of all rows.
    """
    chosen = draw.choice(material.tools)
    call = chosen["messages"][1]["tool_calls"][0]["function"]
    function = {**call, "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
    return {
        "messages": [
            {"role": "user", "content": _text(material.english, 100, draw)},
            {
                "role": "assistant",
                "content": _text(material.english, 40, draw),
                "tool_calls": [{"type": "function", "function": function}],
            },
            {"role": "tool", "content": _text(material.english, 60, draw)},
            {"role": "assistant", "content": _text(material.english, 120, draw)},
        ],
        "tools": json.dumps(chosen["tools"], ensure_ascii=False),
    }


def _text(pool: list[str], size: float, draw: random.Random) -> str:
    """Return a text of at least `size` bytes, of which each sentence joins parts of two others."""
    parts: list[str] = []
    written = 0
    while written < size or not parts:
        first, last = draw.choice(pool), draw.choice(pool)
        sentence = first[: _middle(first)] + last[_middle(last) :]
        parts.append(sentence)
        written += len(sentence.encode())
    return "".join(parts).strip() or "…"


def _middle(sentence: str) -> int:
    """Return the index after the first space after the middle, or the middle."""
    half = len(sentence) // 2
    return sentence.find(" ", half) + 1 or half


def _sizes(lengths: str, draw: random.Random) -> Iterator[int]:
    """Yield sizes of records in bytes of text, without end."""
    file = SHARED / "datasets" / "lengths" / "qwen3_chatml_sharegpt_17671.npy"
    tokens = np.load(file).tolist() if file.exists() else None
    while True:  # the caller stops when its file is full
        if lengths == "short":
            yield int(draw.uniform(0.4, 1.6) * _SHORT_BYTES)
        elif tokens:
            yield min(_BYTES_PER_TOKEN * draw.choice(tokens), 1 << 20)
        else:  # the quartiles of the same distribution
            yield _BYTES_PER_TOKEN * int(min(30_000, draw.lognormvariate(7.0, 0.8)))


def _material() -> tuple[Material, str]:
    """Return the parts of the available data, and the name of their folder."""
    folder, material = SHARED / "datasets", Material()
    if not folder.is_dir():
        for name in ("chats.jsonl", "qa.jsonl"):
            material.english += _sentences(_rows(EXAMPLES / name))
        material.tools = _rows(EXAMPLES / "tools.jsonl")
        material.code = material.english
    else:
        for name in ("gsm8k_train", "alpaca_en_demo", "oasst_en_100_tree", "chitchat_600_messages"):
            material.english += _sentences(_rows(folder / f"{name}.jsonl"))
        languages: dict[str, list[dict[str, Any]]] = {}
        for name in ("xquad_12lang_prompt_completion", "chatterbot_multilingual_messages"):
            for row in _rows(folder / f"{name}.jsonl"):
                languages.setdefault(row.pop("lang"), []).append(row)
        languages["chinese"] = _rows(folder / "alpaca_zh_demo.jsonl")
        material.languages = [_sentences(rows) for _, rows in sorted(languages.items())]
        material.languages = [pool for pool in material.languages if len(pool) >= 200]
        for name in ("mbpp", "humaneval"):
            material.code += _sentences(_rows(folder / f"{name}.jsonl"))
        material.tools = _rows(folder / "bfcl_toolcall_messages.jsonl")
    material.tools = [
        row
        for row in material.tools
        if len(row["messages"]) > 1 and row["messages"][1].get("tool_calls")
    ]
    return material, "shared/data" if folder.is_dir() else "examples/data"


def _rows(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def _sentences(rows: list[dict[str, Any]]) -> list[str]:
    """Return the sentences of all texts of at least 20 characters, except identifiers."""
    found: list[str] = []

    def visit(value: Any) -> None:
        if isinstance(value, str) and len(value) >= 20:
            found.extend(part for part in _SENTENCE.findall(value) if len(part) >= 12)
        elif isinstance(value, dict | list):
            parts = value.items() if isinstance(value, dict) else ((None, v) for v in value)
            for key, part in parts:
                if not str(key).endswith("id"):
                    visit(part)

    visit(rows)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="the file to write")
    parser.add_argument("--megabytes", type=float, default=120, help="size of the file (10^6 B)")
    parser.add_argument("--lengths", choices=["chats", "short"], default="chats")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(
        write_varied(
            arguments.output,
            arguments.megabytes,
            lengths=arguments.lengths,
            seed=arguments.seed,
        )
    )


if __name__ == "__main__":
    main()
