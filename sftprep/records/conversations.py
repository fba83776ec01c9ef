"""Records with messages: conversations, and the keys alongside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sftprep.core.types import Example, Message
from sftprep.records.keys.pair_keys import ANSWER_REASONING_KEYS, SYSTEM_KEYS, find_reasoning
from sftprep.records.messages import read_messages
from sftprep.records.options import InvalidRecord, Record, RecordOptions, require_string
from sftprep.records.roles import SYSTEM_ROLES, is_answered
from sftprep.records.switches import read_switches
from sftprep.records.tool_schemas import read_functions, read_tools, with_parameters
from sftprep.records.unread_turns import find_unread

ANSWER_KEYS = ("answer", "response", "output", "completion")
"""Keys of the answer to a conversation that ends with a message of the user."""

CHAT_KEYS = frozenset({"tools", "functions", "chat_template_kwargs", *SYSTEM_KEYS})
"""Keys that are read alongside every conversation."""

TURN_KEYS = CHAT_KEYS | {*ANSWER_KEYS, *ANSWER_REASONING_KEYS}
"""Keys that are read alongside a list of messages."""


def conversation_reader(key: str) -> Callable[[Record, int, RecordOptions], Example]:
    """Return the reader of records with messages under a key."""

    def convert(record: Record, line: int, options: RecordOptions) -> Example:
        turns = record[key]
        messages = read_messages(turns, key, options)
        if messages is turns:  # plain messages, which need no conversion
            if len(record) == 1:
                return Example(line, messages=messages, bare=True)
            example = Example(line, messages=messages)
        else:
            example = Example(line, messages=messages)
            example.unread_texts, example.unread_switch = find_unread(turns, messages)
        if not is_answered(messages):
            example.messages = _add_answer(messages, record, options)
        return complete_chat(example, record, options)

    return convert


def to_turns(value: Any, role: str, name: str, options: RecordOptions) -> list[Message]:
    """Return the messages of a prompt or an answer.

    Args:
        value: A string, which is one message, or a list of messages.
        role: The role of a string.
        name: The key, for messages of errors.
        options: What the template can show.
    """
    if isinstance(value, list):
        if value and all(isinstance(item, str) for item in value):
            raise InvalidRecord("bad_type", f'"{name}" is a list of texts, not one text')
        return read_messages(value, name, options)
    return [{"role": role, "content": require_string(value, f'"{name}"')}]


def complete_chat(example: Example, record: Record, options: RecordOptions) -> Example:
    """Add the chat keys of a record to its example.

    They are the system prompt, the tools, the template variables and the weights.
    """
    messages = example.messages or []
    if not CHAT_KEYS.isdisjoint(record):
        system = read_system(record, options)
        if system is not None and messages[0]["role"] not in SYSTEM_ROLES:
            messages = example.messages = [{"role": "system", "content": system}, *messages]
            if example.prompt_messages is not None:
                example.prompt_messages = messages[: len(example.prompt_messages) + 1]
        if record.get("tools"):
            example.tools = read_tools(record["tools"])
        if not example.tools and record.get("functions"):
            example.tools = read_functions(record["functions"])
        if example.tools and options.tool_parameters:
            example.tools = [with_parameters(tool, options) for tool in example.tools]
        if record.get("chat_template_kwargs"):
            example.template_kwargs = _read_template_kwargs(record["chat_template_kwargs"])
    # Most messages have only a role and a content; then the keys need not be searched.
    example.bare = max(map(len, messages)) <= 2
    if not example.bare:
        example.weights = read_switches(messages)
    return example


def apply_chat_settings(example: Example, options: RecordOptions) -> None:
    """Add the system message and the template variables of the settings to a conversation.

    What the record specifies takes precedence; a variable that is null is not specified.
    """
    messages = example.messages or []
    if options.system is not None and all(
        message["role"] not in SYSTEM_ROLES for message in messages
    ):
        example.messages = [{"role": "system", "content": options.system}, *messages]
        if example.prompt_messages is not None:
            example.prompt_messages = example.messages[: len(example.prompt_messages) + 1]
        if example.weights is not None:
            example.weights = [None, *example.weights]
        example.system_added = True
    if options.template_kwargs is not None:
        of_record = example.template_kwargs or {}
        specified = {name: value for name, value in of_record.items() if value is not None}
        example.template_kwargs = {**of_record, **options.template_kwargs, **specified}


def read_system(record: Record, options: RecordOptions) -> str | None:
    """Return the system prompt alongside the messages of a record, or None.

    It is text, a list of parts (Anthropic), or an object with `parts` (Gemini).
    """
    for key in SYSTEM_KEYS:
        value = record.get(key)
        if not value:
            continue
        if isinstance(value, (list, dict)):
            turn = value if isinstance(value, dict) else {"content": value}
            content = read_messages([{**turn, "role": "system"}], key, options)[0]["content"]
        else:
            content = require_string(value, f'"{key}"')
        if content.strip():
            return str(content)
    return None


def add_reasoning(answer: list[Message], record: Record) -> list[Message]:
    """Add the reasoning under a separate key of the record to an answer.

    Where the template does not show reasoning, that is counted when it is rendered.
    """
    reasoning = find_reasoning(record)
    return (
        answer
        if reasoning is None
        else [{**answer[0], "reasoning_content": reasoning}, *answer[1:]]
    )


def _add_answer(messages: list[Message], record: Record, options: RecordOptions) -> list[Message]:
    """Add the answer under a separate key of the record to a conversation."""
    key = next((key for key in ANSWER_KEYS if record.get(key)), None)
    if key is None:
        return messages
    return [*messages, *add_reasoning(to_turns(record[key], "assistant", key, options), record)]


def _read_template_kwargs(kwargs: Any) -> dict[str, Any]:
    if not isinstance(kwargs, Mapping):
        raise InvalidRecord("bad_type", '"chat_template_kwargs" is not an object')
    return dict(kwargs)
