"""Records of a request and its answer, under two keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sftprep.core.types import Example, Message
from sftprep.records.conversations import (
    CHAT_KEYS,
    add_reasoning,
    complete_chat,
    read_system,
    to_turns,
)
from sftprep.records.keys.pair_keys import ANSWER_REASONING_KEYS, CONTEXT_KEYS
from sftprep.records.options import InvalidRecord, Record, RecordOptions, load_json, require_string
from sftprep.records.tool_calls import is_call, parse_calls
from sftprep.records.unread_turns import find_unread

_TRL_KEYS = ("prompt", "completion")

PAIR_KEYS = CHAT_KEYS | {*CONTEXT_KEYS, *ANSWER_REASONING_KEYS, "history"}
"""Keys that are read alongside an instruction and its answer."""


def from_prompt_completion(record: Record, line: int, options: RecordOptions) -> Example:
    """Return the example of a prompt and its completion.

    Two strings are joined, as TRL does. Otherwise they are messages; a string is one of them.
    """
    prompt, completion = record["prompt"], record["completion"]
    if options.as_chat or isinstance(prompt, list) or isinstance(completion, list):
        return _to_chat(record, line, options, _TRL_KEYS)
    return Example(
        line,
        prompt=require_string(prompt, '"prompt"'),
        completion=require_string(completion, '"completion"'),
    )


def pair_reader(request: str, answer: str) -> Callable[[Record, int, RecordOptions], Example]:
    """Return the reader of records with a request and an answer under two keys.

    With a chat template they are turns of a user and of the assistant. Without one, an instruction
    has the layout of Stanford Alpaca, and other requests are followed by the answer.
    """
    keys = (request, answer)

    def convert(record: Record, line: int, options: RecordOptions) -> Example:
        if options.chat or isinstance(record[request], list) or isinstance(record[answer], list):
            return _to_chat(record, line, options, keys)
        text = require_string(record[request], f'"{request}"')
        system = read_system(record, options)
        head = f"{system}\n\n" if system else ""
        if request == "instruction":
            head += "".join(
                f"{_alpaca_prompt(question, '')}{reply}\n\n"
                for question, reply in _read_history(record)
            )
            text = _alpaca_prompt(text, _read_context(record, keys))
        completion = require_string(record[answer], f'"{answer}"')
        return Example(line, prompt=head + text, completion=completion)

    return convert


def _to_chat(record: Record, line: int, options: RecordOptions, keys: tuple[str, str]) -> Example:
    """Return the conversation of a request and its answer."""
    request, answer = keys
    prompt: list[Message] = []
    for question, reply in _history_of(record, keys):
        prompt += ({"role": "user", "content": question}, {"role": "assistant", "content": reply})
    turns = to_turns(record[request], "user", request, options)
    if request == "instruction" and not isinstance(record[request], list):
        context = _read_context(record, keys)
        if context:
            turns[0]["content"] += f"\n{context}"
    prompt += turns
    completion = _read_calls(record, answer, options) or to_turns(
        record[answer], "assistant", answer, options
    )
    if keys != _TRL_KEYS and len(completion) == 1:
        completion = add_reasoning(completion, record)
    example = Example(line, prompt_messages=prompt, messages=[*prompt, *completion])
    calls = [[record[answer]]] if completion[0].get("tool_calls") else []
    if calls or isinstance(record[request], list) or isinstance(record[answer], list):
        read_from: list[Any] = [*_list_of(record[request]), *_list_of(record[answer]), *calls]
        example.unread_texts, example.unread_switch = find_unread(read_from, example.messages or [])
    return complete_chat(example, record, options)


def _list_of(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _read_calls(record: Record, answer: str, options: RecordOptions) -> list[Message] | None:
    """Return an answer as tool calls, or None.

    The record must have tools, and the answer must be the JSON of calls.
    """
    text: Any = record[answer]
    if not (record.get("tools") and options.tool_calls) or type(text) is not str:
        return None
    if not text.lstrip().startswith(("[", "{")):
        return None
    try:
        calls = load_json(text, f'"{answer}"')
    except (ValueError, RecursionError):
        return None  # text that starts like JSON
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(map(is_call, calls)):
        return None
    parsed = parse_calls(calls, f'"{answer}"')
    return [{"role": "assistant", "content": "", "tool_calls": parsed}]


def _read_context(record: Record, keys: tuple[str, str]) -> str:
    for key in CONTEXT_KEYS:
        if key not in keys and record.get(key):
            return require_string(record[key], f'"{key}"')
    return ""


def _history_of(record: Record, keys: tuple[str, str]) -> list[tuple[str, str]]:
    """Return the earlier turns of a pair.

    Only an instruction is known to have them under "history"; for other requests, the key may have
    another meaning.
    """
    pairs = record.get("history")
    is_history = isinstance(pairs, list) and all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
        for turn in pairs
    )
    if keys == _TRL_KEYS or (keys[0] != "instruction" and not is_history):
        return []
    return _read_history(record)


def _read_history(record: Record) -> list[tuple[str, str]]:
    pairs = record.get("history") or []
    if not isinstance(pairs, list) or not all(
        isinstance(turn, list) and len(turn) == 2 for turn in pairs
    ):
        raise InvalidRecord("bad_row", '"history" is not a list of [instruction, output] pairs')
    return [
        (require_string(question, '"history"'), require_string(answer, '"history"'))
        for question, answer in pairs
    ]


def _alpaca_prompt(instruction: str, context: str) -> str:
    # Source: https://github.com/tatsu-lab/stanford_alpaca, train.py.
    if context:
        return (
            "Below is an instruction that describes a task, paired with an input that provides"
            " further context. Write a response that appropriately completes the request.\n\n###"
            f" Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"
        )
    return (
        "Below is an instruction that describes a task. Write a response that appropriately"
        f" completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
    )
