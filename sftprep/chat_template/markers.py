"""Markers of a chat template: strings such as <|im_end|> that are meant to be tokens.

A tokenizer without such a token would encode it as ordinary text. Strings of this form are searched
for in the source of the template, and in renderings of short conversations, since some templates
compose them (`'<|' + message.role + '|>'`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from jinja2 import nodes

from sftprep.chat_template.template import ChatTemplate
from sftprep.core.types import Message
from sftprep.errors import TemplateError

_MARKER = re.compile(r"<([|｜])[^\s<>|｜]{1,64}\1>")
_ANSWER = "the answer 5f1c"
"""A text that no template contains."""
_USER: Message = {"role": "user", "content": "the question"}
_ASSISTANT: Message = {"role": "assistant", "content": _ANSWER}
_CONVERSATIONS: tuple[list[Message], ...] = (
    [{"role": "system", "content": "the system"}, _USER, _ASSISTANT],
    [_USER, _ASSISTANT],
)


@dataclass(frozen=True, slots=True)
class Markers:
    """The markers of a template.

    Attributes:
        tokens: The strings that are meant to be tokens, in the order of their first appearance.
        end_token: The one that follows the text of the assistant; None if none does.
    """

    tokens: tuple[str, ...]
    end_token: str | None


def find_markers(source: str, variables: Mapping[str, str]) -> Markers:
    """Return the markers of a chat template.

    Args:
        source: The source of the template.
        variables: The special tokens of the tokenizer, by the names that templates use.

    Raises:
        TemplateError: The source is not a template.

    Example:
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        ->  tokens ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>"), end_token "<|end|>"
    """
    template = ChatTemplate(source, variables=variables, backend="jinja")
    rendered = [*filter(None, (_render(template, messages) for messages in _CONVERSATIONS))]
    found = [
        match[0]
        for text in (*_literals(template.tree), *rendered)
        for match in _MARKER.finditer(text)
    ]
    ends = (text.partition(_ANSWER)[2].lstrip() for text in rendered)
    end = next(filter(None, map(_MARKER.match, ends)), None)
    return Markers(tuple(dict.fromkeys(found)), None if end is None else end[0])


def _literals(tree: nodes.Template) -> Iterable[str]:
    """Yield the strings in a template, in their order, without its comments."""
    found: list[tuple[int, str]] = []
    for node in tree.find_all((nodes.TemplateData, nodes.Const)):
        value = getattr(node, "data", None) or getattr(node, "value", None)
        if isinstance(value, str):
            found.append((node.lineno, value))
    return (text for _, text in sorted(found, key=lambda each: each[0]))


def _render(template: ChatTemplate, messages: list[Message]) -> str | None:
    try:
        return template.render(messages).text
    except TemplateError:  # not every template accepts every conversation
        return None
