"""Records to examples: which format a record has, and one small function a format that reads it.

Adding a format is one function and one line in FORMATS.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from sftprep.batch import Example, Message
from sftprep.errors import FormatError

Record = dict[str, Any]


class Unusable(Exception):
    """A record that does not fit its format. reason: short and stable; the text says what is wrong where."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Reading:
    """How records of one input are read: the keys to rename, the key of plain text, and what the template can show.

    chat: there is a chat template; tool_calls: it shows `tool_calls`.
    """

    renames: tuple[tuple[str, str], ...] = ()
    text_field: str = "text"
    chat: bool = True
    tool_calls: bool = True


@dataclass(frozen=True, slots=True)
class Format:
    """keys: a record that has them all is of this format; convert: reads it, or raises Unusable."""

    keys: frozenset[str]
    convert: Callable[[Record, int, Reading], Example]


def read_record(record: Record, line: int, format_name: str, reading: Reading) -> Example:
    """One record as an Example, which takes its parts over. Raises Unusable; reason `other_schema` where the keys are those of
    another format."""
    if reading.renames:
        record = _renamed(record, reading.renames)
    kind = FORMATS[format_name]
    if not kind.keys <= record.keys() and not (format_name == "text" and reading.text_field in record):
        raise _missing_keys(record, format_name, reading)
    return kind.convert(record, line, reading)


def detect_format(record: Record, reading: Reading) -> str | None:
    """The first format in FORMATS whose keys the record has, or None."""
    if reading.renames:
        record = _renamed(dict(record), reading.renames)
    for name, kind in FORMATS.items():
        keys = {reading.text_field} if name == "text" else kind.keys
        if keys <= record.keys():
            return name
    return None


def unknown_format(file: str, record: Record, reading: Reading) -> FormatError:
    """What to say where no format fits the records of a file."""
    known = "; ".join(f"{name}: {', '.join(sorted(kind.keys))}" for name, kind in FORMATS.items())
    keys = ", ".join(map(repr, list(record)[:12])) or "none"
    return FormatError(
        f"no format fits {file}: its records have the keys {keys}",
        remedy=f"name the text with --text-field KEY, rename keys with --map question=prompt,answer=completion, "
        f"or convert them. Formats and their keys: {known}",
    )


def _renamed(record: Record, renames: tuple[tuple[str, str], ...]) -> Record:
    # A renamed key wins over one that had the name before: the user asked for it. A key that is not there renames nothing.
    taken = {target: record.pop(source) for source, target in renames if source in record}
    record.update(taken)
    return record


def _missing_keys(record: Record, format_name: str, reading: Reading) -> Unusable:
    wanted = {reading.text_field} if format_name == "text" else FORMATS[format_name].keys
    missing = ", ".join(f'"{key}"' for key in sorted(wanted - record.keys()))
    other = detect_format(record, Reading(text_field=reading.text_field))
    if other is not None and other != format_name:
        return Unusable("other_schema", f"a {other} record among {format_name} records: {missing} is missing")
    return Unusable("bad_row", f"{missing} is missing from this {format_name} record")


# --- the formats -------------------------------------------------------------------------------------------------------


def from_text(record: Record, line: int, reading: Reading) -> Example:
    """Plain text for language modelling."""
    return Example(line, text=_string(record[reading.text_field], f'"{reading.text_field}"'))


def from_prompt_completion(record: Record, line: int, reading: Reading) -> Example:
    """A prompt and its completion, both text or both lists of messages."""
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        head, tail = check_messages(prompt, "prompt"), check_messages(completion, "completion")
        return Example(
            line, prompt_messages=head, messages=head + tail, tools=_tools(record), template_kwargs=_template_kwargs(record)
        )
    if isinstance(prompt, list) or isinstance(completion, list):
        raise Unusable("bad_type", '"prompt" and "completion" are to be both text or both lists of messages')
    return Example(line, prompt=_string(prompt, '"prompt"'), completion=_string(completion, '"completion"'))


def from_messages(record: Record, line: int, reading: Reading) -> Example:
    """A conversation in the OpenAI layout."""
    messages = check_messages(record["messages"], "messages")
    return Example(line, messages=messages, tools=_tools(record), template_kwargs=_template_kwargs(record))


def from_sharegpt(record: Record, line: int, reading: Reading) -> Example:
    """A conversation as from/value turns (or role/content ones), with `system` and `tools` beside it."""
    turns = record["conversations"]
    if not isinstance(turns, list):
        raise Unusable("bad_row", '"conversations" is not a list of turns')
    messages = [_sharegpt_message(turn, number, reading) for number, turn in enumerate(turns, 1)]
    system = record.get("system")
    if system and not (messages and messages[0].get("role") == "system"):
        messages.insert(0, {"role": "system", "content": _string(system, '"system"')})
    return Example(line, messages=check_messages(messages, "conversations"), tools=_tools(record))


def from_alpaca(record: Record, line: int, reading: Reading) -> Example:
    """An instruction, an optional input, and the output that is trained; the Stanford layout where there is no chat template."""
    instruction = _string(record["instruction"], '"instruction"')
    given = _string(record.get("input") or "", '"input"')
    output = _string(record["output"], '"output"')
    if not reading.chat:
        return Example(line, prompt=_alpaca_prompt(instruction, given), completion=output)
    prompt: list[Message] = []
    if record.get("system"):
        prompt.append({"role": "system", "content": _string(record["system"], '"system"')})
    for turn in record.get("history") or []:
        if not (isinstance(turn, list) and len(turn) == 2):
            raise Unusable("bad_row", '"history" is not a list of [instruction, output] pairs')
        prompt.append({"role": "user", "content": _string(turn[0], '"history"')})
        prompt.append({"role": "assistant", "content": _string(turn[1], '"history"')})
    prompt.append({"role": "user", "content": f"{instruction}\n{given}" if given else instruction})
    return Example(line, prompt_messages=prompt, messages=[*prompt, {"role": "assistant", "content": output}])


FORMATS: dict[str, Format] = {
    "prompt-completion": Format(frozenset({"prompt", "completion"}), from_prompt_completion),
    "messages": Format(frozenset({"messages"}), from_messages),
    "sharegpt": Format(frozenset({"conversations"}), from_sharegpt),
    "alpaca": Format(frozenset({"instruction", "output"}), from_alpaca),
    "text": Format(frozenset({"text"}), from_text),
}
"""In the order of detection."""


# --- messages ----------------------------------------------------------------------------------------------------------

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython", "environment"})

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "function_call",
}


def check_messages(value: Any, name: str) -> list[Message]:
    """The messages, with typed text parts joined; raises Unusable where one has no role, no content, or a wrong type."""
    if not isinstance(value, list):
        raise Unusable("bad_row", f'"{name}" is {"null" if value is None else "not a list of messages"}')
    if not value:
        raise Unusable("bad_row", f'"{name}" holds no message')
    for number, message in enumerate(value):
        if type(message) is not dict:
            raise Unusable("bad_row", f'message {number + 1} of "{name}" is not an object')
        role = message.get("role")
        if type(role) is not str or role not in ROLES:
            raise _bad_role(message, role, number, name)
        content = message.get("content")
        if type(content) is str:
            continue
        value[number] = _with_text(message, content, f'message {number + 1} of "{name}"')
    return value


def _bad_role(message: Message, role: Any, number: int, name: str) -> Unusable:
    where = f'message {number + 1} of "{name}"'
    if role is None:
        hint = ': it has "from" and "value", as sharegpt turns have' if "from" in message else ""
        return Unusable("bad_row", f'{where} has no "role"{hint}')
    return Unusable("unknown_role", f"{where} has the role {role!r}; known roles: {', '.join(sorted(ROLES))}")


def _with_text(message: Message, content: Any, where: str) -> Message:
    """A message whose content is not a string: typed parts are joined, no content is fine beside tool calls."""
    if content is None:
        if message.get("tool_calls"):
            return message
        raise Unusable("bad_row", f"{where} has no content")
    if isinstance(content, list):
        return {**message, "content": "".join(_part_text(part, where) for part in content)}
    raise Unusable("bad_type", f"the content of {where} is a {type(content).__name__}, not text")


def _part_text(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        raise Unusable("unsupported_part", f"{where} has a content part of type {kind!r}; only text parts can be read")
    for key in ("text", "value", "content"):
        if key in part:
            return _string(part[key], f"a text part of {where}")
    raise Unusable("bad_row", f"a text part of {where} has no text")


def _sharegpt_message(turn: Any, number: int, reading: Reading) -> Message:
    if type(turn) is not dict:
        raise Unusable("bad_row", f'turn {number} of "conversations" is not an object')
    if "role" in turn and "from" not in turn:
        return turn
    for key in ("from", "value"):
        if key not in turn:
            raise Unusable("bad_row", f'"{key}" is missing in turn {number} of "conversations"')
    speaker, value = turn["from"], turn["value"]
    role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        known = ", ".join(sorted(_SHAREGPT_ROLES))
        raise Unusable("unknown_role", f'turn {number} of "conversations" is from {speaker!r}; known: {known}')
    if role == "function_call":
        return _call_message(_string(value, f"turn {number}"), number, reading)
    return {"role": role, "content": value}


def _call_message(text: str, number: int, reading: Reading) -> Message:
    """A sharegpt function call as an assistant turn: with `tool_calls` where the template shows them, as its text otherwise."""
    if not reading.tool_calls:
        return {"role": "assistant", "content": text}
    try:
        calls = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise Unusable("bad_tool", f"the function call in turn {number} is no JSON: {error.msg}") from error
    calls = calls if isinstance(calls, list) else [calls]
    functions = [call.get("function", call) if isinstance(call, dict) else None for call in calls]
    if not all(isinstance(function, dict) and "name" in function for function in functions):
        raise Unusable("bad_tool", f"the function call in turn {number} has no name")
    calls = [{"type": "function", "function": {"name": f["name"], "arguments": f.get("arguments", {})}} for f in functions if f]
    return {"role": "assistant", "content": "", "tool_calls": calls}


# --- beside the messages -----------------------------------------------------------------------------------------------


def _string(value: Any, what: str) -> str:
    if type(value) is str:
        return value
    if value is None:
        raise Unusable("bad_row", f"{what} is null")
    raise Unusable("bad_type", f"{what} is a {type(value).__name__}, not text")


def _tools(record: Record) -> list[Any] | None:
    """Tool schemas as objects, whether they came as objects or as JSON text; none at all is None, not an empty list."""
    tools = record.get("tools")
    if not tools:
        return None
    tools = _decoded(tools, '"tools"')
    if not isinstance(tools, list):
        raise Unusable("bad_tool", '"tools" is not a list of tool schemas')
    return [_decoded(tool, "a tool schema") for tool in tools] or None


def _decoded(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise Unusable("bad_tool", f"{what} is text, but no JSON: {error}") from error


def _template_kwargs(record: Record) -> dict[str, Any] | None:
    kwargs = record.get("chat_template_kwargs")
    if not kwargs:
        return None
    if not isinstance(kwargs, Mapping):
        raise Unusable("bad_type", '"chat_template_kwargs" is not an object')
    return dict(kwargs)


def _alpaca_prompt(instruction: str, given: str) -> str:
    if given:
        return (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{given}\n\n### Response:\n"
        )
    return (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n### Response:\n"
    )
