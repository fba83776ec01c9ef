"""Spans of a rendered conversation, by the author of their text.

For templates with `{% generation %}` marks, the marks are the spans. For all others, the spans are
derived:

1. The loops of the template report which message wrote which part of the text (turn_tracking.py).
2. The header of an assistant's turn is what the generation prompt writes at inference.
3. The span is the rest of the turn, up to and including the token that ends the turn.

That these rules hold for a template is tested once, on probes whose contents occur nowhere else. At
run time, each span must contain its message, or the conversation is rejected.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sftprep.chat_template.template import ChatTemplate, Rendered
from sftprep.core.types import Message
from sftprep.errors import TemplateError

ASSISTANTS = frozenset({"assistant", "model"})
"""Roles of messages that the model is to write."""


class TurnSpan(NamedTuple):
    """Characters [first, last) written by the author of a message."""

    first: int
    last: int
    message: int  # index of the message; -1: none


@dataclass(frozen=True, slots=True)
class TurnRule:
    """The properties of a template needed to find the spans of its turns."""

    headers: tuple[str, ...]  # what it may write before an assistant's words, longest first
    ends_turns: bool  # whether it writes anything after the content of a turn
    # Whether it writes text after its last turn; that text belongs to the last turn.
    closes_conversation: bool
    tools_fault: str | None  # why spans are not proven for conversations with tools


class Unproven(TemplateError):
    """A failure to prove the spans of a template or of one conversation."""


def derive_rule(template: ChatTemplate) -> TurnRule:
    """Derive the rule of a template with reported turns.

    Raises:
        Unproven: No rule holds for the template; with the reason.
    """
    fault = ""
    # Some templates, those of vision models, accept only contents that are lists of parts.
    for probe in (_PROBE, [_with_parts(message) for message in _PROBE]):
        try:
            rule = _test_rule(template, _find_header(template, probe[:1]), probe, None)
            break
        except TemplateError as error:
            fault = fault or error.message
    else:
        raise Unproven(f"its assistant turns cannot be distinguished from the rest: {fault}")
    tools = _test_tools(template, rule)
    if isinstance(tools, str):
        return TurnRule(rule.headers, rule.ends_turns, rule.closes_conversation, tools)
    headers = tuple(sorted({*rule.headers, *tools}, key=len, reverse=True))
    return TurnRule(headers, rule.ends_turns, rule.closes_conversation, tools_fault=None)


def find_turn_spans(
    rendered: Rendered, messages: Sequence[Message], rule: TurnRule, numbers: Iterable[int]
) -> list[TurnSpan]:
    """Return the spans of some messages, in the order of the text.

    The span of an assistant's turn is what follows its header. The headers of other messages are
    not known; their span is their content and what follows.

    Args:
        rendered: The conversation, with its regions.
        messages: The messages of the conversation.
        rule: The rule of the template.
        numbers: The indices of the messages.

    Raises:
        Unproven: A span does not contain its message.

    Example:
        "<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nYes<|im_end|>\\n", numbers [1]
        ->  the span of "Yes<|im_end|>"
    """
    numbers = sorted(set(numbers))
    if rule.tools_fault is not None and any(
        message.get("role") == "tool" or message.get("tool_calls") for message in messages
    ):
        raise Unproven(
            "assistant turns in conversations with tools cannot be distinguished from the rest:"
            f" {rule.tools_fault}"
        )
    spans: list[TurnSpan] = []
    parts_of_message: dict[int, list[tuple[int, int]]] = {}
    for first, last, writer in rendered.regions:
        parts_of_message.setdefault(writer, []).append((first, last))
    for number in numbers:
        parts = parts_of_message.get(number)
        if parts is None:
            _check_merged(rendered.text, number, messages, spans)
            continue
        message = messages[number]
        span = (
            _span_of_simple_turn(rendered.text, number, message, parts[0], rule)
            if len(parts) == 1
            else None
        )
        spans += (
            _spans_of_any_turn(rendered.text, number, message, parts, rule)
            if span is None
            else (span,)
        )
    if rule.closes_conversation and messages and len(messages) - 1 in numbers:
        tail = rendered.regions[-1]
        if tail.message == -1 and rendered.text[tail.first : tail.last].strip():
            spans.append(TurnSpan(tail.first, tail.last, len(messages) - 1))
    spans.sort()
    return spans


def find_marked_spans(rendered: Rendered) -> list[TurnSpan]:
    """Return the spans marked by the template.

    Each has the message whose region it starts in.
    """
    spans = []
    for first, last in rendered.spans:
        writer = next(
            (message for begin, end, message in rendered.regions if begin <= first < end), -1
        )
        spans.append(TurnSpan(first, last, writer))
    return spans


def is_assistant(message: Message) -> bool:
    """Return whether the model writes a message."""
    return message.get("role") in ASSISTANTS


def contents_of(message: Message) -> list[str]:
    """Return the strings in the content of a message, without whitespace around them.

    Templates strip this whitespace. Empty strings are left out.
    """
    content = message.get("content")
    texts = (
        [content]
        if isinstance(content, str)
        else [part.get("text") for part in content or () if isinstance(part, dict)]
    )
    return [stripped for text in texts if isinstance(text, str) and (stripped := text.strip())]


# --- deriving a rule from probes ------------------------------------------------------------------

_REASONING = re.compile(r"<think>.*", re.DOTALL)
"""A reasoning block that a generation prompt opens, or skips. It counts as the assistant's own
words, as in TRL's templates."""


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _with_parts(message: Message) -> Message:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


_TOOL_RESULT = "Ww5rexi"
_PROBE: list[Message] = [  # contents that occur in no template
    _turn("user", "Qq7kuza"),
    _turn("assistant", "Zz3mabe"),
    _turn("user", "Qq8vitu"),
    _turn("assistant", "Zz4nolo"),
]
_TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "fn",
            "description": "d",
            "parameters": {
                "type": "object",
                "properties": {"x": {"type": "string", "description": "x"}},
                "required": ["x"],
            },
        },
    }
]


def _test_rule(
    template: ChatTemplate,
    headers: tuple[str, ...],
    messages: list[Message],
    tools: list[Any] | None,
) -> TurnRule:
    """Return the rule for the turns of a probe conversation.

    Raises:
        TemplateError: No rule holds.
    """
    rendered = template.render(messages, tools=tools)
    last_turn = "".join(
        rendered.text[first:last]
        for first, last, writer in rendered.regions
        if writer == len(messages) - 1
    )
    answer = contents_of(messages[-1])[0]
    if answer not in last_turn:
        raise TemplateError("it does not write a turn while its loop is at that turn")
    rule = TurnRule(
        headers,
        ends_turns=bool(last_turn[last_turn.index(answer) + len(answer) :].strip()),
        closes_conversation=rendered.regions[-1].message == -1,
        tools_fault=None,
    )
    turns = [number for number, message in enumerate(messages) if is_assistant(message)]
    texts = []
    for turn in turns:
        spans = find_turn_spans(rendered, messages, rule, [turn])
        texts.append("".join(rendered.text[first:last] for first, last, _ in spans))
    # The span of each assistant turn must contain the content of this turn, and of no other one.
    for text, turn in zip(texts, turns, strict=True):
        for number, message in enumerate(messages):
            if any((content in text) != (number == turn) for content in contents_of(message)):
                raise TemplateError(
                    f"message {number + 1} of a probe is written in the turn of message {turn + 1}"
                )
    return rule


def _find_header(
    template: ChatTemplate, messages: list[Message], tools: list[Any] | None = None
) -> tuple[str, ...]:
    """Return the header: the generation prompt after these messages.

    A reasoning block that the prompt opens is left out.
    """
    prompted = template.render(messages, tools=tools, add_generation_prompt=True)
    plain = template.render(messages, tools=tools)
    start = _start_of_last_turn(plain, messages)
    # The last turn, without text that closes the conversation.
    end = plain.regions[-1].first if plain.regions and plain.regions[-1].message == -1 else None
    last_turn = plain.text[start:end]
    if not prompted.text.startswith(plain.text[:start] + last_turn):
        raise TemplateError("its generation prompt changes the text before it")
    return (_REASONING.sub("", prompted.text[start + len(last_turn) :]),)


def _start_of_last_turn(rendered: Rendered, messages: list[Message]) -> int:
    last = len(messages) - 1
    first = next(
        (region.first for region in reversed(rendered.regions) if region.message == last), None
    )
    if first is None:
        raise TemplateError(
            f"it does not write a {messages[last]['role']} message while its loop is at that"
            " message"
        )
    return first


def _test_tools(template: ChatTemplate, rule: TurnRule) -> str | tuple[str, ...]:
    """Return the headers after the result of a tool.

    If conversations with tools are not proven, return the reason instead.
    """
    errors = []
    # Some templates reject arguments of calls in one of the two forms.
    for arguments in ({"x": "v"}, '{"x": "v"}'):
        call = {
            "id": "call00001",
            "type": "function",
            "function": {"name": "fn", "arguments": arguments},
        }
        probe = [_PROBE[0], {**_turn("assistant", ""), "tool_calls": [call]}]
        probe.append({**_turn("tool", _TOOL_RESULT), "name": "fn", "tool_call_id": "call00001"})
        try:
            after_result = _find_header(template, probe, _TOOLS)
            headers = tuple(sorted({*rule.headers, *after_result}, key=len, reverse=True))
            _test_rule(template, headers, [*probe, *_PROBE[1:]], _TOOLS)
        except TemplateError as error:
            errors.append(error)
        else:
            return after_result
    # An error of a rule says more than a rejection by the template, which has a cause.
    return next((error for error in errors if error.__cause__ is None), errors[0]).message


# --- spans of one conversation --------------------------------------------------------------------


def _check_merged(
    text: str, number: int, messages: Sequence[Message], spans: list[TurnSpan]
) -> None:
    """Check a message without a region, merged into the turn before it.

    That turn must have the same role and contain the message.

    Raises:
        Unproven: It is not.
    """
    merged = "".join(text[first:last] for first, last, _ in spans[-1:])
    has_same_role = (
        number > 0
        and bool(spans)
        and messages[number - 1].get("role") == messages[number].get("role")
    )
    if not all(has_same_role and content in merged for content in contents_of(messages[number])):
        raise Unproven(f"message {number + 1} is written nowhere, or not in its own turn")


def _span_of_simple_turn(
    text: str, number: int, message: Message, part: tuple[int, int], rule: TurnRule
) -> TurnSpan | None:
    """Return the span of an assistant's turn with unchanged content in one region.

    Most turns are like this. Returns None for any other turn.
    """
    content = message.get("content")
    if not is_assistant(message) or not isinstance(content, str):
        return None
    first, last = part
    for header in rule.headers:
        if text.startswith(header, first, last):
            words = text[first + len(header) : last]
            words = words.rstrip() if rule.ends_turns else words
            first += len(header)
            return (
                TurnSpan(first, first + len(words), number)
                if words and content.strip() in words
                else None
            )
    return None


def _spans_of_any_turn(
    text: str, number: int, message: Message, parts: list[tuple[int, int]], rule: TurnRule
) -> list[TurnSpan]:
    """Return the spans of any turn, one for each of its regions.

    Raises:
        Unproven: The turn does not start with a header, or does not contain its message.
    """
    contents = contents_of(message)
    first, last = parts[0][0], parts[-1][1]
    # 1. Skip the header.
    if is_assistant(message):
        start = text[first : parts[0][1]]
        header = next((header for header in rule.headers if start.startswith(header)), None)
        if header is None:
            raise Unproven(
                f"the turn of message {number + 1} does not start as the template starts a turn"
            )
        first += len(header)
    else:
        content_start = text.find(contents[0], first, parts[0][1]) if contents else -1
        if content_start < 0:
            raise Unproven(f"message {number + 1} is not written as it is in the record")
        first = content_start
    # 2. Leave out the whitespace after the token that ends the turn.
    if rule.ends_turns:
        last -= len(text[first:last]) - len(text[first:last].rstrip())
    clipped = [(max(begin, first), min(end, last)) for begin, end in parts]
    spans = [TurnSpan(begin, end, number) for begin, end in clipped if begin < end]
    # 3. Check that the spans contain the message.
    words = "".join(text[begin:end] for begin, end, _ in spans)
    for content in contents:
        # Templates omit reasoning that is part of the content of an earlier turn.
        if (
            content not in words
            and content.rpartition("</think>")[2].strip() not in words
            and not message.get("tool_calls")
        ):
            raise Unproven(f"message {number + 1} is not written as it is in the record")
    return spans
