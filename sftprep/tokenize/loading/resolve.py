"""The child process that asks transformers what a tokenizer is.

    python -m sftprep.tokenize.loading.resolve NAME ANSWER_FILE

The answer is a JSON file: the fields of a `TokenizerSpec`, or `error` and `remedy`. Only this
process imports transformers.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from sftprep.errors import TokenizerError
from sftprep.tokenize.loading.adversarial_texts import adversarial_texts
from sftprep.tokenize.loading.spec import TokenizerSpec, tokenizer_spec


def main(name: str, answer_file: str) -> int:
    """Write the answer, whole or not at all; 0 where it is a tokenizer, 1 where it is an error."""
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


def resolve(name: str) -> TokenizerSpec:
    """AutoTokenizer's view of a folder, checked to be wholly in the JSON that is handed on.

    Raises TokenizerError for whatever transformers raises.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (
        Exception
    ) as error:  # anything: transformers passes on what the tokenizer's own class raises
        raise _explained(name, error) from error
    spec = tokenizer_spec(tokenizer, name=name)
    check_json(spec, tokenizer)
    return spec


def _explained(name: str, error: Exception) -> TokenizerError:
    text = " ".join(str(error).split())
    detail = text if len(text) <= 400 else text[:400] + " ..."
    if "trust_remote_code" in text:
        return TokenizerError(
            f"the tokenizer of {name} needs Python code from its repository, which is never run"
            " here",
            remedy=(
                "save it once as a fast tokenizer (tokenizer.json) in a folder of its own, and give"
                " that folder"
            ),
        )
    if "sentencepiece" in text or "tiktoken" in text:
        return TokenizerError(
            f"the tokenizer of {name} has no tokenizer.json, and cannot be converted here:"
            f" {detail}",
            remedy=(
                "pip install sentencepiece tiktoken protobuf, or give a folder with a"
                " tokenizer.json"
            ),
        )
    return TokenizerError(
        f"transformers cannot load the tokenizer of {name}: {type(error).__name__}: {detail}",
        remedy="its files may be damaged or incomplete: download or copy them again",
    )


def check_json(spec: TokenizerSpec, tokenizer: Any) -> None:
    """A setting of the live object that its JSON lacks would make other ids later: compare them
    now. Raises TokenizerError."""
    from tokenizers import Tokenizer

    written = Tokenizer.from_buffer(spec.json)
    written.encode_special_tokens = spec.split_special_tokens
    for text in adversarial_texts(spec):
        live = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        again = written.encode(text, add_special_tokens=False).ids
        if live != again:
            raise TokenizerError(
                f"{spec.name} ({type(tokenizer).__name__}) does more than its tokenizer.json says: "
                f"{text[:80]!r} gives {live[:20]}, not {again[:20]}",
                remedy="use a tokenizer whose tokenizer.json does all the work",
            )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
