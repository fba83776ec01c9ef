"""The child process to load a tokenizer with transformers.

It writes the specification of the tokenizer.

    python -m sftprep.tokenize.loading.resolve NAME ANSWER_FILE

The answer is a JSON file with the fields of a `TokenizerSpec`, or with `error` and `remedy`. Only
this process imports transformers.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from sftprep.errors import TokenizerError
from sftprep.tokenize.loading.adversarial_texts import adversarial_texts
from sftprep.tokenize.loading.spec import TokenizerSpec, tokenizer_spec

_MOST_MEMORY = 12 << 30
"""Bytes of data of the process; large tokenizers take 2 GB with torch."""


def main(name: str, answer_file: str) -> int:
    """Write the answer, complete or not at all.

    Returns:
        The exit code: 0 for a tokenizer, 1 for an error.
    """
    _limit_memory()
    try:
        spec = resolve(name)
        answer = {**spec.to_fields(), "json": spec.json.decode()}
    except TokenizerError as error:
        answer = {"error": error.message, "remedy": error.remedy}
    temporary = answer_file + ".part"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(answer, file)
    os.replace(temporary, answer_file)
    return 1 if "error" in answer else 0


def _limit_memory() -> None:
    """Limit the memory of this process: a normalizer may multiply every text.

    Windows has no such limits.
    """
    try:
        import resource
    except ImportError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = _MOST_MEMORY if hard == resource.RLIM_INFINITY else min(_MOST_MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def resolve(name: str) -> TokenizerSpec:
    """Return AutoTokenizer's result for a name or folder, checked against its JSON.

    Raises:
        TokenizerError: transformers raises any error, or the JSON lacks a part of the tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # any type: it may come from the class of the tokenizer
        raise _explain(name, error) from error
    spec = tokenizer_spec(tokenizer, name=name)
    check_json(spec, tokenizer)
    return spec


def _explain(name: str, error: Exception) -> TokenizerError:
    text = " ".join(str(error).split())
    detail = text if len(text) <= 400 else text[:400] + " ..."
    if "trust_remote_code" in text:
        return TokenizerError(
            f"the tokenizer of {name} needs Python code from its repository, which is never run"
            " here",
            remedy=(
                "save it once as a fast tokenizer (tokenizer.json) in a folder of its own, and"
                " specify that folder"
            ),
        )
    if "sentencepiece" in text or "tiktoken" in text:
        return TokenizerError(
            f"the tokenizer of {name} has no tokenizer.json, and cannot be converted here:"
            f" {detail}",
            remedy=[
                "pip install sentencepiece tiktoken protobuf",
                "specify a folder with a tokenizer.json",
            ],
        )
    return TokenizerError(
        f"transformers cannot load the tokenizer of {name}: {type(error).__name__}: {detail}",
        remedy="its files may be damaged or incomplete: download or copy them again",
    )


def check_json(spec: TokenizerSpec, tokenizer: Any) -> None:
    """Check the ids of a live tokenizer against those of its JSON.

    A setting of the live object that the JSON lacks would make builds use other ids than the user.

    Raises:
        TokenizerError: They differ on an adversarial text.
    """
    from tokenizers import Tokenizer

    from_json = Tokenizer.from_buffer(spec.json)
    from_json.encode_special_tokens = spec.split_special_tokens
    for text in adversarial_texts(spec):
        expected = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        got = from_json.encode(text, add_special_tokens=False).ids
        if expected != got:
            raise TokenizerError(
                f"{spec.name} ({type(tokenizer).__name__}) does more than its tokenizer.json says: "
                f"{text[:80]!r} gives {expected[:20]}, not {got[:20]}",
                remedy="use a tokenizer whose tokenizer.json does all the work",
            )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
