"""Which characters of a rendered conversation a message's author wrote: derived for templates
without `{% generation %}` marks.

What a turn wrote is known from the template's loops (turn_tracking.py). Of an assistant's turn, its
header is what the generation prompt writes at inference, and the span is the rest, up to and with
the token that ends the turn. That this holds for a template is shown once, on probes with contents
that stand nowhere else; at run time each span must hold its message.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sftprep.chat_template.template import ChatTemplate, Rendered
from sftprep.core.types import Message
from sftprep.errors import TemplateError


class TurnSpan(NamedTuple):
    """Characters [first, last) that a message's author wrote."""

    first: int
    last: int
    message: int


@dataclass(frozen=True, slots=True)
class TurnRule:
    """What holds for a template. headers: what it writes before an assistant's words, longest
    first; ends: something ends a turn.

    closes: it writes an end after the last turn, which belongs to that turn; tools: why
    conversations with tools are not proven.
    """

    headers: tuple[str, ...]
    ends: bool
    closes: bool
    tools: str | None


class Unproven(TemplateError):
    """Spans that cannot be shown to be right, of a template or of one conversation."""


def derive_rule(template: ChatTemplate) -> TurnRule:
    """The rule of a template that notes its turns. Raises Unproven with the reason where it has
    none."""
    fault = ""
    for talk in (
        _TALK,
        [
            {**message, "content": [{"type": "text", "text": message["content"]}]}
            for message in _TALK
        ],
    ):
        # Some templates, those of image models, take contents as lists of parts only.
        try:
            rule = _rule(template, _prompted(template, talk[:1]), talk, None)
            break
        except TemplateError as error:
            fault = fault or error.message
    else:
        raise Unproven(f"its assistant turns cannot be told from the rest: {fault}")
    tools = _tools_fault(template, rule)
    if isinstance(tools, tuple):
        headers = tuple(sorted({*rule.headers, *tools}, key=len, reverse=True))
        return TurnRule(headers, rule.ends, rule.closes, None)
    return TurnRule(rule.headers, rule.ends, rule.closes, tools)


def turn_spans(
    rendered: Rendered, messages: Sequence[Message], rule: TurnRule, of: Iterable[int]
) -> list[TurnSpan]:
    """The spans of the messages `of`, in the order of the text. Raises Unproven where a span does
    not hold its message.

    An assistant's turn is what follows its header; of another message, whose header nobody knows,
    its content and what follows.
    """
    wanted = sorted(set(of))
    if rule.tools is not None and any(
        message.get("role") == "tool" or message.get("tool_calls") for message in messages
    ):
        raise Unproven(f"assistant turns beside tools cannot be told from the rest: {rule.tools}")
    spans: list[TurnSpan] = []
    found: dict[int, list[tuple[int, int]]] = {}
    for first, last, writer in rendered.regions:
        found.setdefault(writer, []).append((first, last))
    for number in wanted:
        parts = found.get(number)
        if parts is None:
            _check_merged(rendered.text, number, messages, spans)
            continue
        message = messages[number]
        span = (
            _whole_turn(rendered.text, number, message, parts[0], rule) if len(parts) == 1 else None
        )
        spans += _parts_of(rendered.text, number, message, parts, rule) if span is None else (span,)
    if rule.closes and messages and len(messages) - 1 in wanted:
        tail = rendered.regions[-1]
        if tail.message == -1 and rendered.text[tail.first : tail.last].strip():
            spans.append(TurnSpan(tail.first, tail.last, len(messages) - 1))
    spans.sort()
    return spans


def marked_spans(rendered: Rendered) -> list[TurnSpan]:
    """The spans that the template itself marks, each with the message in whose part of the text it
    starts; -1 for none."""
    spans = []
    for first, last in rendered.spans:
        writer = next(
            (message for begin, end, message in rendered.regions if begin <= first < end), -1
        )
        spans.append(TurnSpan(first, last, writer))
    return spans


def is_assistant(message: Message) -> bool:
    """Whether a message is one that the model is to write."""
    return message.get("role") in ASSISTANTS


ASSISTANTS = frozenset({"assistant", "model"})
_USER, _ANSWER, _USER_2, _ANSWER_2, _RESULT = "Qq7kuza", "Zz3mabe", "Qq8vitu", "Zz4nolo", "Ww5rexi"
_OPENED = re.compile(r"<think>.*", re.DOTALL)
"""A reasoning block that a generation prompt opens, or skips: it counts as the assistant's own
words, as in TRL's templates."""


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


_TALK: list[Message] = [
    _turn("user", _USER),
    _turn("assistant", _ANSWER),
    _turn("user", _USER_2),
    _turn("assistant", _ANSWER_2),
]


def _rule(
    template: ChatTemplate,
    headers: tuple[str, ...],
    messages: list[Message],
    tools: list[Any] | None,
) -> TurnRule:
    """The rule that holds for a probe. Raises TemplateError where none does."""
    rendered = template.render(messages, tools=tools)
    chunk = _text_of(rendered, len(messages) - 1)
    answer = contents_of(messages[-1])[0]
    if answer not in chunk:
        raise TemplateError("it does not write a turn while its loop is at that turn")
    rule = TurnRule(
        headers,
        bool(chunk[chunk.index(answer) + len(answer) :].strip()),
        rendered.regions[-1].message == -1,
        None,
    )
    assistants = [number for number, message in enumerate(messages) if is_assistant(message)]
    texts = [
        "".join(rendered.text[s.first : s.last] for s in turn_spans(rendered, messages, rule, [n]))
        for n in assistants
    ]
    for text, own in zip(texts, assistants, strict=True):
        for number, message in enumerate(messages):
            if any((content in text) != (number == own) for content in contents_of(message)):
                raise TemplateError(
                    f"message {number + 1} of a probe is written in the turn of message {own + 1}"
                )
    return rule


def _prompted(
    template: ChatTemplate, messages: list[Message], tools: list[Any] | None = None
) -> tuple[str, ...]:
    """What the generation prompt writes after these messages, less a reasoning block that it
    opens."""
    asked = template.render(messages, tools=tools, add_generation_prompt=True)
    plain = template.render(messages, tools=tools)
    start = _start_of_last(plain, messages)
    written = plain.text[
        start : (
            plain.regions[-1].first if plain.regions and plain.regions[-1].message == -1 else None
        )
    ]
    if not asked.text.startswith(plain.text[:start] + written):
        raise TemplateError("its generation prompt changes what stands before it")
    return (_OPENED.sub("", asked.text[start + len(written) :]),)


def _start_of_last(rendered: Rendered, messages: list[Message]) -> int:
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


def _tools_fault(template: ChatTemplate, rule: TurnRule) -> str | tuple[str, ...]:
    """Why conversations with tools are not proven, or the headers after a tool's result."""
    reasons = []
    for arguments in ({"x": "v"}, '{"x": "v"}'):
        call = {
            "id": "call00001",
            "type": "function",
            "function": {"name": "fn", "arguments": arguments},
        }
        talk = [_TALK[0], {**_turn("assistant", ""), "tool_calls": [call]}]
        talk.append({**_turn("tool", _RESULT), "name": "fn", "tool_call_id": "call00001"})
        try:
            after = _prompted(template, talk, _TOOLS)
            headers = tuple(sorted({*rule.headers, *after}, key=len, reverse=True))
            _rule(template, headers, [*talk, _TALK[1], *_TALK[2:]], _TOOLS)
        except TemplateError as error:
            reasons.append(error.message)
        else:
            return after
    # Some templates refuse arguments of one kind: then the other kind tells more.
    return next((reason for reason in reasons if "refuses" not in reason), reasons[0])


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


def _text_of(rendered: Rendered, message: int) -> str:
    return "".join(
        rendered.text[first:last] for first, last, writer in rendered.regions if writer == message
    )


def _check_merged(
    text: str, number: int, messages: Sequence[Message], spans: list[TurnSpan]
) -> None:
    """A message without a part of its own stands in the turn before it, which is of the same role.
    Raises Unproven."""
    merged = "".join(text[first:last] for first, last, _ in spans[-1:])
    same = (
        number > 0
        and bool(spans)
        and messages[number - 1].get("role") == messages[number].get("role")
    )
    if not all(same and content in merged for content in contents_of(messages[number])):
        raise Unproven(f"message {number + 1} is written nowhere, or not in its own turn")


def _whole_turn(
    text: str, number: int, message: Message, part: tuple[int, int], rule: TurnRule
) -> TurnSpan | None:
    """The span of a turn as most are: of an assistant, in one part, with its content as it is; None
    for any other."""
    content = message.get("content")
    if not is_assistant(message) or not isinstance(content, str):
        return None
    first, last = part
    for header in rule.headers:
        if text.startswith(header, first, last):
            written = text[first + len(header) : last]
            written = written.rstrip() if rule.ends else written
            first += len(header)
            return (
                TurnSpan(first, first + len(written), number)
                if written and content.strip() in written
                else None
            )
    return None


def _parts_of(
    text: str, number: int, message: Message, parts: list[tuple[int, int]], rule: TurnRule
) -> list[TurnSpan]:
    """The spans of any turn. Raises Unproven."""
    contents = contents_of(message)
    first, last = parts[0][0], parts[-1][1]
    if is_assistant(message):
        chunk = text[first : parts[0][1]]
        header = next((header for header in rule.headers if chunk.startswith(header)), None)
        if header is None:
            raise Unproven(
                f"the turn of message {number + 1} does not start as the template starts a turn"
            )
        first += len(header)
    else:
        at = text.find(contents[0], first, parts[0][1]) if contents else -1
        if at < 0:
            raise Unproven(f"message {number + 1} is not written as it is in the record")
        first = at
    if rule.ends:
        last -= len(text[first:last]) - len(text[first:last].rstrip())
    pieces = [(max(a, first), min(b, last)) for a, b in parts]
    spans = [TurnSpan(a, b, number) for a, b in pieces if a < b]
    written = "".join(text[a:b] for a, b, _ in spans)
    for content in contents:
        # Templates leave out reasoning that stands inside the content of an earlier turn.
        if (
            content not in written
            and content.rpartition("</think>")[2].strip() not in written
            and not message.get("tool_calls")
        ):
            raise Unproven(f"message {number + 1} is not written as it is in the record")
    return spans


def contents_of(message: Message) -> list[str]:
    """The texts that a message says, without blanks around them; templates trim those."""
    content = message.get("content")
    texts = (
        [content]
        if isinstance(content, str)
        else [part.get("text") for part in content or () if isinstance(part, dict)]
    )
    return [stripped for text in texts if isinstance(text, str) and (stripped := text.strip())]
