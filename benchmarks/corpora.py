"""Corpora for the benchmarks, as JSON Lines.

They come from a folder of data next to the checkout, a PyPI package, or a file of the user.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.varied import write_varied

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
CORPORA = ("varied", "short", "chitchat", "gsm8k")


def make_corpus(name: str, folder: Path, megabytes: int = 120) -> tuple[Path, list[str]]:
    """Return a file of JSON Lines and the keys to rename in it (as for `map` of a build).

    Args:
        name: One of CORPORA, or a path:
            varied, short: chats without repeated contents (benchmarks/varied.py);
            chitchat: 7,168 conversations of the PyPI package chitchat-dataset (MIT), as messages;
            gsm8k: 7,473 questions and answers.
        folder: The folder for a generated file.
        megabytes: The size of a varied or short corpus in 10^6 bytes.

    Raises:
        SystemExit: If the corpus does not exist; the message says what to do.
    """
    if name == "chitchat":
        path = folder / "chitchat.jsonl"
        path.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _chitchat()),
            encoding="utf-8",
        )
        return path, []
    if name in ("varied", "short"):
        path = folder / f"{name}.jsonl"
        write_varied(path, megabytes, lengths="chats" if name == "varied" else "short")
        return path, []
    if name == "gsm8k":
        path = SHARED / "datasets" / "gsm8k_train.jsonl"
        if not path.exists():
            raise SystemExit(f"{path} does not exist: specify --data FILE.jsonl")
        return path, ["question=prompt", "answer=completion"]
    if not Path(name).exists():
        raise SystemExit(f"{name} is neither one of {', '.join(CORPORA)} nor a file")
    return Path(name), []


def positive_int(text: str) -> int:
    """Return a positive integer from an argument; raise ArgumentTypeError otherwise."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def tokenizer_folder(name: str) -> Path:
    """Return the folder of a tokenizer, by its path or its name in the folder of data."""
    for path in (Path(name), SHARED / "tokenizers" / name):
        if path.is_dir():
            return path
    raise SystemExit(f"there is no tokenizer folder {name}: specify --tokenizer DIR")


def training_template(tokenizer: Path) -> Path | None:
    """Return TRL's template with `{% generation %}` blocks for a tokenizer.

    It is found in the package trl by the name of the tokenizer's folder; None if there is none.
    """
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "chat_templates" / f"{tokenizer.name}_training.jinja"
    return path if path.exists() else None


def repeat_records(path: Path, copies: int, output: Path, *, limit: int | None = None) -> Path:
    """Write several copies of the records of a file, of which no two are equal.

    A number precedes the text of each record. At most `limit` records of the file are used.
    """
    with open(path, encoding="utf-8") as source:
        rows = [json.loads(line) for line in source if line.strip()][:limit]
    with open(output, "w", encoding="utf-8") as target:
        for copy in range(copies):
            for number, row in enumerate(rows):
                target.write(
                    json.dumps(_with_prefix(row, f"{copy}.{number} "), ensure_ascii=False) + "\n"
                )
    return output


def _with_prefix(row: dict[str, Any], prefix: str) -> dict[str, Any]:
    for key, value in row.items():
        if isinstance(value, str):
            return {**row, key: prefix + value}
        if (
            isinstance(value, list)
            and value
            and isinstance(value[0], dict)
            and isinstance(value[0].get("content"), str)
        ):
            return {**row, key: [{**value[0], "content": prefix + value[0]["content"]}, *value[1:]]}
    return row


def _chitchat() -> Iterator[dict[str, Any]]:
    try:
        import chitchat_dataset
    except ImportError as error:
        raise SystemExit(
            "the chitchat corpus needs a package: pip install chitchat-dataset"
        ) from error
    for conversation in chitchat_dataset.Dataset().values():
        speakers: dict[str, str] = {}
        messages = []
        for turn in conversation["messages"]:
            role = speakers.setdefault(turn[0]["sender"], "assistant" if speakers else "user")
            messages.append(
                {"role": role, "content": "\n".join(message["text"] for message in turn)}
            )
        if messages:
            yield {"messages": messages}


def add_corpus_arguments(parser: argparse.ArgumentParser, *, megabytes: int) -> None:
    """Add `--data` and `--megabytes`, the arguments of `make_corpus`, to the flags of a benchmark.

    Args:
        parser: The parser.
        megabytes: The default size.
    """
    parser.add_argument("--data", default="varied", help=f"{', '.join(CORPORA)}, or a JSONL file")
    parser.add_argument(
        "--megabytes",
        type=positive_int,
        default=megabytes,
        help="size of varied or short chats (10^6 B)",
    )
