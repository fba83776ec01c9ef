"""Real text for the benchmarks, as JSON lines: a folder of data beside the checkout, a PyPI
package, or any file given."""

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


def corpus(name: str, folder: Path, megabytes: int = 120) -> tuple[Path, list[str]]:
    """A file of JSON lines and the keys to rename in it (as for --map). name: one of CORPORA, or a
    path.

    varied, short: chats of which no content is repeated (benchmarks/varied.py), of that size.

    chitchat: 7,168 conversations of the PyPI package chitchat-dataset (MIT), as messages. gsm8k:
    7,473 questions and answers. Raises SystemExit with what to do where it is not there.
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
            raise SystemExit(f"{path} is not there: give --data FILE.jsonl instead")
        return path, ["question=prompt", "answer=completion"]
    if not Path(name).exists():
        raise SystemExit(f"{name} is not one of {', '.join(CORPORA)}, and not a file")
    return Path(name), []


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse. Raises ArgumentTypeError."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def tokenizer_folder(name: str) -> Path:
    """The folder of a tokenizer: a path, or the name of one in the folder of data. Raises
    SystemExit."""
    for path in (Path(name), SHARED / "tokenizers" / name):
        if path.is_dir():
            return path
    raise SystemExit(f"no tokenizer folder {name}: give --tokenizer DIR")


def training_template(tokenizer: Path) -> Path | None:
    """TRL's template with `{% generation %}` marks for a tokenizer, by the name of its folder, in
    the package trl; None if there is none."""
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "chat_templates" / f"{tokenizer.name}_training.jinja"
    return path if path.exists() else None


def repeated(path: Path, copies: int, output: Path, *, limit: int | None = None) -> Path:
    """The file, several times over, with a number put before each text so that no two records are
    the same; at most `limit`."""
    with open(path, encoding="utf-8") as source:
        rows = [json.loads(line) for line in source if line.strip()][:limit]
    with open(output, "w", encoding="utf-8") as target:
        for copy in range(copies):
            for number, row in enumerate(rows):
                target.write(
                    json.dumps(_marked(row, f"{copy}.{number} "), ensure_ascii=False) + "\n"
                )
    return output


def _marked(row: dict[str, Any], mark: str) -> dict[str, Any]:
    for key, value in row.items():
        if isinstance(value, str):
            return {**row, key: mark + value}
        if (
            isinstance(value, list)
            and value
            and isinstance(value[0], dict)
            and isinstance(value[0].get("content"), str)
        ):
            return {**row, key: [{**value[0], "content": mark + value[0]["content"]}, *value[1:]]}
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
