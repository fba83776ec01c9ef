"""The formats of records: how each is detected, and one small function that reads it.

Adding a format is one function and one line in FORMATS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sftprep.core.types import Example, Message
from sftprep.errors import FormatError, setting, source_name
from sftprep.records.messages import (
    WEIGHT_KEYS,
    check_messages,
    from_sharegpt_turn,
    message_weight,
)
from sftprep.records.options import (
    InvalidRecord,
    Record,
    RecordOptions,
    parse_if_string,
    rename_keys,
    require_string,
)
from sftprep.records.pretokenized import from_tokens


@dataclass(frozen=True, slots=True)
class Format:
    """A format of records.

    Attributes:
        keys: The keys that identify the format: a record that has them all is of this format.
        convert: Returns the example of a record with its line number, or raises InvalidRecord.
    """

    keys: frozenset[str]
    convert: Callable[[Record, int, RecordOptions], Example]


def record_reader(format_name: str, options: RecordOptions) -> Callable[[Record, int], Example]:
    """Return a function that converts a record with its line number to an Example.

    The Example shares parts of the record, which must not be used afterwards. The function raises
    InvalidRecord; its reason is `other_schema` if the keys are those of another format.
    """
    keys, convert = keys_of(format_name, options), FORMATS[format_name].convert

    def read(record: Record, line: int) -> Example:
        if options.renames:
            record = rename_keys(record, options.renames)
        for key in keys:
            if key not in record:
                raise _missing_keys(record, format_name, options)
        return convert(record, line, options)

    return read


def read_record(record: Record, line: int, format_name: str, options: RecordOptions) -> Example:
    """Return the Example of a single record; see `record_reader`."""
    return record_reader(format_name, options)(record, line)


def keys_of(format_name: str, options: RecordOptions) -> frozenset[str]:
    """Return the keys that identify a format, after keys were renamed."""
    return frozenset({options.text_field}) if format_name == "text" else FORMATS[format_name].keys


def detect_format(record: Record, options: RecordOptions) -> str | None:
    """Return the first format in FORMATS whose keys the record has, or None."""
    if options.renames:
        record = rename_keys(dict(record), options.renames)
    for name in FORMATS:
        if keys_of(name, options) <= record.keys():
            return name
    return None


def keys_read(options: RecordOptions) -> frozenset[str]:
    """Return the keys that any format may read; readers of tables skip all other columns."""
    identifying = frozenset(key for kind in FORMATS.values() for key in kind.keys)
    renamed = {source for source, _ in options.renames}
    return identifying | _OPTIONAL_KEYS | {options.text_field} | renamed


def unknown_format(file: str, record: Record, options: RecordOptions) -> FormatError:
    """Return the error for a file whose records fit no format.

    Args:
        file: The file.
        record: One of its records.
        options: The options with which it was read.
    """
    record = rename_keys(dict(record), options.renames) if options.renames else record
    known = "; ".join(f"{name}: {', '.join(sorted(kind.keys))}" for name, kind in FORMATS.items())
    keys = ", ".join(map(repr, list(record)[:12])) or "none"
    return FormatError(
        f"no format fits {source_name(file)}: its records have the keys {keys}"
        + (f" after {setting('map')}" if options.renames else ""),
        remedy=[
            f"specify the key of the text with {setting('text_field', 'KEY')}",
            f"rename keys with {setting('map', 'question=prompt,answer=completion')}",
            f"convert the records. The formats and their keys are: {known}",
        ],
    )


_OPTIONAL_KEYS = frozenset({"tools", "chat_template_kwargs", "system", "input", "history"}) | {
    "labels",
    "completion_mask",
    "assistant_masks",
    "attention_mask",
    "position_ids",
    "seq_lengths",
}
"""Keys that formats read in addition to those that identify them."""


def _missing_keys(record: Record, format_name: str, options: RecordOptions) -> InvalidRecord:
    required = keys_of(format_name, options)
    missing = ", ".join(f'"{key}"' for key in sorted(required - record.keys()))
    # Without renames: the keys of the record are renamed already.
    other = detect_format(record, RecordOptions(text_field=options.text_field))
    if other is not None and other != format_name:
        return InvalidRecord(
            "other_schema", f"a {other} record among {format_name} records: {missing} is missing"
        )
    return InvalidRecord("bad_row", f"{missing} is missing from this {format_name} record")


# --- the formats ----------------------------------------------------------------------------------


def from_text(record: Record, line: int, options: RecordOptions) -> Example:
    """Return the example of plain text for language modelling."""
    return Example(line, text=require_string(record[options.text_field], f'"{options.text_field}"'))


def from_prompt_completion(record: Record, line: int, options: RecordOptions) -> Example:
    """Return the example of a prompt and its completion.

    Both are strings, or both are lists of messages.
    """
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        head = check_messages(prompt, "prompt", options)
        tail = check_messages(completion, "completion", options)
        return _add_chat_fields(Example(line, prompt_messages=head, messages=head + tail), record)
    if isinstance(prompt, list) or isinstance(completion, list):
        raise InvalidRecord(
            "bad_type", '"prompt" and "completion" must both be text or both be lists of messages'
        )
    return Example(
        line,
        prompt=require_string(prompt, '"prompt"'),
        completion=require_string(completion, '"completion"'),
    )


def from_messages(record: Record, line: int, options: RecordOptions) -> Example:
    """Return the example of a conversation in the layout of OpenAI."""
    messages = check_messages(record["messages"], "messages", options)
    return _add_chat_fields(Example(line, messages=messages), record)


def from_sharegpt(record: Record, line: int, options: RecordOptions) -> Example:
    """Return the example of a conversation of from/value turns, with `system` and `tools`.

    Turns with role and content are accepted too.
    """
    turns = record["conversations"]
    if not isinstance(turns, list):
        raise InvalidRecord("bad_row", '"conversations" is not a list of turns')
    messages = [from_sharegpt_turn(turn, number, options) for number, turn in enumerate(turns, 1)]
    # The system prompt is a key of the record in some data sets, and the first turn in others.
    system = record.get("system")
    if system and not (messages and messages[0].get("role") == "system"):
        messages.insert(0, {"role": "system", "content": require_string(system, '"system"')})
    messages = check_messages(messages, "conversations", options)
    return _add_chat_fields(Example(line, messages=messages), record)


def from_alpaca(record: Record, line: int, options: RecordOptions) -> Example:
    """Return the example of an instruction, an optional input, and the output.

    Without a chat template, the text has the layout of Stanford Alpaca.
    """
    instruction = require_string(record["instruction"], '"instruction"')
    context = require_string(record.get("input") or "", '"input"')
    output = require_string(record["output"], '"output"')
    system = require_string(record.get("system") or "", '"system"')
    history = _read_history(record)
    # 1. Text, without a chat template.
    if not options.chat:
        earlier = "".join(
            f"{_alpaca_prompt(question, '')}{answer}\n\n" for question, answer in history
        )
        head = f"{system}\n\n" if system else ""
        return Example(
            line, prompt=head + earlier + _alpaca_prompt(instruction, context), completion=output
        )
    # 2. A conversation.
    prompt: list[Message] = [{"role": "system", "content": system}] if system else []
    for question, answer in history:
        prompt += ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    request = f"{instruction}\n{context}" if context else instruction
    prompt.append({"role": "user", "content": request})
    return Example(
        line, prompt_messages=prompt, messages=[*prompt, {"role": "assistant", "content": output}]
    )


FORMATS: dict[str, Format] = {
    "tokens": Format(frozenset({"input_ids"}), from_tokens),
    "prompt-completion": Format(frozenset({"prompt", "completion"}), from_prompt_completion),
    "messages": Format(frozenset({"messages"}), from_messages),
    "sharegpt": Format(frozenset({"conversations"}), from_sharegpt),
    "alpaca": Format(frozenset({"instruction", "output"}), from_alpaca),
    "text": Format(frozenset({"text"}), from_text),
}
"""The formats by name, in the order in which they are detected."""


# --- parts of records -----------------------------------------------------------------------------


def _add_chat_fields(example: Example, record: Record) -> Example:
    """Add tools, arguments of the template and weights to the example of a conversation."""
    if record.get("tools"):
        example.tools = _read_tools(record["tools"])
    if record.get("chat_template_kwargs"):
        example.template_kwargs = _read_template_kwargs(record["chat_template_kwargs"])
    messages = example.messages or []
    # Most messages have only a role and a content; then the keys need not be searched.
    example.bare = max(map(len, messages)) <= 2
    if not example.bare and any(key in message for message in messages for key in WEIGHT_KEYS):
        weights = [message_weight(m, number) for number, m in enumerate(messages)]
        # A switch that is null is absent.
        example.weights = None if weights.count(None) == len(weights) else weights
    return example


def _read_tools(tools: Any) -> list[Any] | None:
    """Return tool schemas as objects, whether they are objects or JSON strings.

    An empty list becomes None, because templates distinguish the two.
    """
    tools = parse_if_string(tools, '"tools"')
    if not isinstance(tools, list):
        raise InvalidRecord("bad_tool", '"tools" is not a list of tool schemas')
    return [parse_if_string(tool, "a tool schema") for tool in tools] or None


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


def _read_template_kwargs(kwargs: Any) -> dict[str, Any]:
    if not isinstance(kwargs, Mapping):
        raise InvalidRecord("bad_type", '"chat_template_kwargs" is not an object')
    return dict(kwargs)


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
