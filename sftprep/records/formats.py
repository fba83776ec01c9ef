"""Records to examples: which format a record has, and one small function a format that reads it.

Adding a format is one function and one line in FORMATS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sftprep.core.types import Example, Message
from sftprep.errors import FormatError
from sftprep.records.messages import SWITCHES, check_messages, sharegpt_message, weight_of
from sftprep.records.options import InvalidRecord, Record, RecordOptions, decoded, string_of
from sftprep.records.pretokenized import from_tokens


@dataclass(frozen=True, slots=True)
class Format:
    """keys: a record that has them all is of this format; convert: reads it, or raises
    InvalidRecord."""

    keys: frozenset[str]
    convert: Callable[[Record, int, RecordOptions], Example]


def record_reader(format_name: str, reading: RecordOptions) -> Callable[[Record, int], Example]:
    """A function that reads one record, with the number of its line, as an Example.

    The Example takes over parts of the record. Raises InvalidRecord; reason `other_schema` if the
    keys are those of another format.
    """
    keys, convert = keys_of(format_name, reading), FORMATS[format_name].convert

    def read(record: Record, line: int) -> Example:
        if reading.renames:
            record = _renamed(record, reading.renames)
        if reading.function is not None:
            return _formatted(record, line, reading.function)
        for key in keys:
            if key not in record:
                raise _missing_keys(record, format_name, reading)
        return convert(record, line, reading)

    return read


def read_record(record: Record, line: int, format_name: str, reading: RecordOptions) -> Example:
    """As `record_reader`, for a single record."""
    return record_reader(format_name, reading)(record, line)


def keys_of(format_name: str, reading: RecordOptions) -> frozenset[str]:
    """The keys that a record of a format has, once it is renamed."""
    return frozenset({reading.text_field}) if format_name == "text" else FORMATS[format_name].keys


def detect_format(record: Record, reading: RecordOptions) -> str | None:
    """The first format in FORMATS whose keys the record has, or None; what a function formats is
    text."""
    if reading.function is not None:
        return "text"
    if reading.renames:
        record = _renamed(dict(record), reading.renames)
    for name in FORMATS:
        if keys_of(name, reading) <= record.keys():
            return name
    return None


def keys_read(reading: RecordOptions) -> frozenset[str] | None:
    """The keys of a record that any format looks at; None where a function of the user's may look
    at all."""
    if reading.function is not None:
        return None
    of_formats = frozenset(key for kind in FORMATS.values() for key in kind.keys)
    return of_formats | _BESIDE | {reading.text_field} | {source for source, _ in reading.renames}


def unknown_format(file: str, record: Record, reading: RecordOptions) -> FormatError:
    """What to say where no format fits the records of a file."""
    record = _renamed(dict(record), reading.renames) if reading.renames else record
    known = "; ".join(f"{name}: {', '.join(sorted(kind.keys))}" for name, kind in FORMATS.items())
    keys = ", ".join(map(repr, list(record)[:12])) or "none"
    return FormatError(
        f"no format fits {file}: its records have the keys {keys}"
        + (" after --map" if reading.renames else ""),
        remedy=(
            "name the text with --text-field KEY, rename keys with --map"
            f" question=prompt,answer=completion, or convert them. Formats and their keys: {known}"
        ),
    )


_BESIDE = frozenset({"tools", "chat_template_kwargs", "system", "input", "history"}) | frozenset(
    {
        "labels",
        "completion_mask",
        "assistant_masks",
        "attention_mask",
        "position_ids",
        "seq_lengths",
    }
)
"""Keys that formats read beside those that tell them."""


def _renamed(record: Record, renames: tuple[tuple[str, str], ...]) -> Record:
    # A renamed key wins over one that had the name before: the user asked for it. A key that is not
    # there renames nothing.
    taken = {target: record.pop(source) for source, target in renames if source in record}
    record.update(taken)
    return record


def _missing_keys(record: Record, format_name: str, reading: RecordOptions) -> InvalidRecord:
    wanted = keys_of(format_name, reading)
    missing = ", ".join(f'"{key}"' for key in sorted(wanted - record.keys()))
    other = detect_format(record, RecordOptions(text_field=reading.text_field))
    if other is not None and other != format_name:
        return InvalidRecord(
            "other_schema", f"a {other} record among {format_name} records: {missing} is missing"
        )
    return InvalidRecord("bad_row", f"{missing} is missing from this {format_name} record")


# --- the formats ----------------------------------------------------------------------------------


def from_text(record: Record, line: int, reading: RecordOptions) -> Example:
    """Plain text for language modelling."""
    return Example(line, text=string_of(record[reading.text_field], f'"{reading.text_field}"'))


def from_prompt_completion(record: Record, line: int, reading: RecordOptions) -> Example:
    """A prompt and its completion, both text or both lists of messages."""
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        head, tail = (
            check_messages(prompt, "prompt", reading),
            check_messages(completion, "completion", reading),
        )
        return _chat(Example(line, prompt_messages=head, messages=head + tail), record)
    if isinstance(prompt, list) or isinstance(completion, list):
        raise InvalidRecord(
            "bad_type", '"prompt" and "completion" are to be both text or both lists of messages'
        )
    return Example(
        line, prompt=string_of(prompt, '"prompt"'), completion=string_of(completion, '"completion"')
    )


def from_messages(record: Record, line: int, reading: RecordOptions) -> Example:
    """A conversation in the OpenAI layout."""
    return _chat(
        Example(line, messages=check_messages(record["messages"], "messages", reading)), record
    )


def from_sharegpt(record: Record, line: int, reading: RecordOptions) -> Example:
    """A conversation as from/value turns (or role/content ones), with `system` and `tools` beside
    it."""
    turns = record["conversations"]
    if not isinstance(turns, list):
        raise InvalidRecord("bad_row", '"conversations" is not a list of turns')
    messages = [sharegpt_message(turn, number, reading) for number, turn in enumerate(turns, 1)]
    system = record.get("system")
    if system and not (messages and messages[0].get("role") == "system"):
        messages.insert(0, {"role": "system", "content": string_of(system, '"system"')})
    return _chat(Example(line, messages=check_messages(messages, "conversations", reading)), record)


def from_alpaca(record: Record, line: int, reading: RecordOptions) -> Example:
    """An instruction, an optional input, and the output that is trained; the Stanford layout where
    there is no chat template."""
    instruction = string_of(record["instruction"], '"instruction"')
    given = string_of(record.get("input") or "", '"input"')
    output = string_of(record["output"], '"output"')
    system = string_of(record.get("system") or "", '"system"')
    history = _history(record)
    if not reading.chat:
        earlier = "".join(
            f"{_alpaca_prompt(asked, '')}{answered}\n\n" for asked, answered in history
        )
        head = f"{system}\n\n" if system else ""
        return Example(
            line, prompt=head + earlier + _alpaca_prompt(instruction, given), completion=output
        )
    prompt: list[Message] = [{"role": "system", "content": system}] if system else []
    for asked, answered in history:
        prompt += ({"role": "user", "content": asked}, {"role": "assistant", "content": answered})
    prompt.append({"role": "user", "content": f"{instruction}\n{given}" if given else instruction})
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
"""In the order of detection."""


# --- beside the messages --------------------------------------------------------------------------


def _chat(example: Example, record: Record) -> Example:
    """The example with what stands beside its messages, and with the switches that stand in
    them."""
    if record.get("tools"):
        example.tools = _tools(record["tools"])
    if record.get("chat_template_kwargs"):
        example.template_kwargs = _template_kwargs(record["chat_template_kwargs"])
    messages = example.messages or []
    # Most have a role and a content, and nothing else.
    example.bare = max(map(len, messages)) <= 2
    if not example.bare and any(key in message for message in messages for key in SWITCHES):
        example.weights = [weight_of(m, number) for number, m in enumerate(messages)]
    return example


def _tools(tools: Any) -> list[Any] | None:
    """Tool schemas as objects, whether they came as objects or as JSON text; none at all is None,
    not an empty list."""
    tools = decoded(tools, '"tools"')
    if not isinstance(tools, list):
        raise InvalidRecord("bad_tool", '"tools" is not a list of tool schemas')
    return [decoded(tool, "a tool schema") for tool in tools] or None


def _history(record: Record) -> list[tuple[str, str]]:
    pairs = record.get("history") or []
    if not isinstance(pairs, list) or not all(
        isinstance(turn, list) and len(turn) == 2 for turn in pairs
    ):
        raise InvalidRecord("bad_row", '"history" is not a list of [instruction, output] pairs')
    return [
        (string_of(asked, '"history"'), string_of(answered, '"history"'))
        for asked, answered in pairs
    ]


def _formatted(record: Record, line: int, function: Callable[[Record], Any]) -> Example:
    """What a function of the user makes of a record: a text, or several."""
    try:
        made = function(record)
    except (Exception, SystemExit) as error:
        # Code of the user, which may raise anything: that is a fault of this record.
        raise InvalidRecord(
            "function_failed", f"the formatting function raised {type(error).__name__}: {error}"
        ) from error
    texts = [made] if isinstance(made, str) else made
    if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
        if any(
            "\ud800" <= character <= "\udfff"
            for text in texts
            if not text.isascii()
            for character in text
        ):
            raise InvalidRecord(
                "bad_unicode",
                "the formatting function gave half of a surrogate pair, which cannot be text",
            )
        return Example(line, text=made) if isinstance(made, str) else Example(line, texts=texts)
    what = (
        f"a {type(made).__name__}"
        if not isinstance(made, list)
        else "an empty list"
        if not made
        else "a list of other things"
    )
    raise InvalidRecord(
        "bad_function_result", f"the formatting function gave {what}, not a text or a list of texts"
    )


def _template_kwargs(kwargs: Any) -> dict[str, Any]:
    if not isinstance(kwargs, Mapping):
        raise InvalidRecord("bad_type", '"chat_template_kwargs" is not an object')
    return dict(kwargs)


def _alpaca_prompt(instruction: str, given: str) -> str:
    if given:
        return (
            "Below is an instruction that describes a task, paired with an input that provides"
            " further context. Write a response that appropriately completes the request.\n\n###"
            f" Instruction:\n{instruction}\n\n### Input:\n{given}\n\n### Response:\n"
        )
    return (
        "Below is an instruction that describes a task. Write a response that appropriately"
        f" completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
    )
