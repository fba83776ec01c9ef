"""Compilation and rendering of chat templates with Jinja.

The results are exactly those of `apply_chat_template`.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from functools import lru_cache
from types import CodeType
from typing import Any, NamedTuple

import jinja2
from jinja2 import meta, nodes

from sftprep.chat_template.reference.growth_limits import size_of
from sftprep.chat_template.reference.sandbox import ChatEnvironment, GenerationTag, is_generation
from sftprep.chat_template.reference.turn_tracking import track_turns
from sftprep.core.json_values import describe_json_type
from sftprep.core.types import Message
from sftprep.errors import TemplateError, setting

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Keys under which data sets store the reasoning of a turn. Most templates read the first one, and
those of gpt-oss the second."""

OUTPUT_FLOOR = 1 << 20
"""Characters that any template may write, however small its input is."""
OUTPUT_RATIO = 64
"""Characters that a template may write for each character of its input, beyond the floor."""

_MISSING_SPECIAL_TOKEN = re.compile(r"'((?:bos|eos|unk|sep|pad|cls|mask)_token)' is undefined")


class ParsedTemplate(NamedTuple):
    """A chat template, parsed and compiled by Jinja."""

    tree: nodes.Template
    template: jinja2.Template
    has_marks: bool  # whether it contains `generation` blocks
    # Whether it may write into its input: Jinja 3.1 lets `{% set message.role %}...{% endset %}`
    # write into a dictionary, although `{% set message.role = 1 %}` fails.
    mutates_input: bool


def compile_template(
    environment: ChatEnvironment, source: str, *, turns: bool = False
) -> ParsedTemplate:
    """Parse and compile a chat template.

    Args:
        environment: The environment that the template will run in.
        source: The source of the template.
        turns: Whether its loops report the message that they are at.

    Raises:
        TemplateError: The source is not a template; with the line, if Jinja reports one.
    """
    remedy = ["correct the chat template", f"specify another one with {setting('chat_template')}"]
    try:
        tree, code = _compile_source(source, turns)
        return ParsedTemplate(
            tree,
            jinja2.Template.from_code(environment, code, environment.make_globals(None)),
            has_marks=any(is_generation(node) for node in tree.find_all(nodes.CallBlock)),
            mutates_input=any(
                isinstance(node.target, nodes.NSRef | nodes.Tuple)
                for node in tree.find_all(nodes.AssignBlock)
            ),
        )
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(
            f"line {error.lineno} of the chat template: {error.message}", remedy=remedy
        ) from error
    except (
        jinja2.TemplateError,
        SyntaxError,
        ValueError,
        OverflowError,
        RecursionError,
        MemoryError,
    ) as error:
        raise TemplateError(
            f"the chat template does not compile: {type(error).__name__}: {error}", remedy=remedy
        ) from error


# Cached, because a build checks its template before it uses it. The code refers to nothing in the
# environment that it was compiled in, so other environments can use it.
@lru_cache(maxsize=4)
def _compile_source(source: str, turns: bool) -> tuple[nodes.Template, CodeType]:
    environment = ChatEnvironment(datetime.date.min)
    tree = environment.parse(source)
    if turns:
        track_turns(tree, environment, GenerationTag.identifier)
    return tree, environment.compile(tree)


@lru_cache(maxsize=8)
def find_variables(source: str) -> frozenset[str]:
    """Return the names that a chat template may read from its variables.

    They include names that a part of the template assigns before it reads them.
    """
    return frozenset(
        meta.find_undeclared_variables(ChatEnvironment(datetime.date.min).parse(source))
    )


def run_template(
    environment: ChatEnvironment, template: jinja2.Template, variables: Mapping[str, Any]
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Render a conversation with Jinja.

    Returns:
        The text, and the characters [first, last) of its `generation` blocks.

    Raises:
        TemplateError: The template rejects the conversation (with the template's own message), or
            it fails for any other reason.
    """
    tag = environment.generation
    tag.start()
    blocks: list[str] = []
    limit = OUTPUT_FLOOR
    try:
        for block in template.generate(variables):
            blocks.append(block)
            tag.written += len(block)
            if tag.written > limit:
                check_output(tag.written, variables)
                # The size of the input is only computed for a long output, and only once.
                limit = max_output(variables)
    except TemplateError:
        raise
    except Exception as error:
        # A template is a program from an unknown author: it may raise anything, and whatever it
        # raises concerns only this conversation.
        is_raised_by_template = type(error) is jinja2.TemplateError
        message = str(error) if is_raised_by_template else f"{type(error).__name__}: {error}"
        missing = (
            _MISSING_SPECIAL_TOKEN.search(message)
            if isinstance(error, jinja2.UndefinedError)
            else None
        )
        if missing is not None and missing[1] not in variables:
            name = missing[1]
            message += f": the tokenizer has no such token, and the template writes its {name}"
        raise TemplateError(
            f"the chat template rejects the conversation: {message}",
            remedy=[
                "change the record so that the template accepts it",
                f"specify another template with {setting('chat_template')}",
            ],
        ) from error
    return "".join(blocks), tuple(tag.spans)


def max_output(variables: Mapping[str, Any]) -> int:
    """Return the largest permitted number of output characters for these variables."""
    return OUTPUT_FLOOR + OUTPUT_RATIO * size_of(variables)


def check_output(num_characters: int, variables: Mapping[str, Any]) -> None:
    """Reject an output far larger than its input.

    Raises:
        TemplateError: The output has more characters than the template may write.
    """
    limit = max_output(variables)
    if num_characters > limit:
        raise TemplateError(
            f"the chat template writes more than {limit} characters for this conversation",
            remedy="check the chat template: its output is far larger than its input",
        )


def normalize_messages(messages: list[Message]) -> list[Message]:
    """Return messages in the form passed to templates by `apply_chat_template`.

    Keys whose value is None are removed, and the reasoning of a turn is stored under the keys that
    templates read. Where nothing changes, the same list is returned. Source: `apply_chat_template`
    of transformers 5.23, except that an empty key never hides the reasoning of another one.

    Raises:
        TemplateError: A message is not a dictionary.
    """
    normalized = messages
    for index, original in enumerate(messages):
        message = original
        if not isinstance(message, dict):
            raise TemplateError(
                f"message {index + 1} is {describe_json_type(message)}, not an object",
                remedy='write each message as {"role": ..., "content": ...}',
            )
        # The list is copied when the first message changes: most conversations change nothing.
        if None in message.values():
            if normalized is messages:
                normalized = list(messages)
            message = {key: value for key, value in message.items() if value is not None}
            normalized[index] = message
        if "reasoning_content" in message or "thinking" in message or "reasoning" in message:
            found = [message[key] for key in REASONING_KEYS if message.get(key) is not None]
            if found:
                reasoning = next(filter(None, found), found[0])  # an empty one hides no other
                if normalized is messages:
                    normalized = list(messages)
                thinking = message.get("thinking") or reasoning
                normalized[index] = {
                    "thinking": reasoning,  # the first key, as in transformers
                    **message,
                    "reasoning_content": reasoning,
                } | {"thinking": thinking}
    return normalized


def check_tools(tools: list[Any]) -> None:
    """Check the tool schemas.

    Raises:
        TemplateError: A schema is not an object.
    """
    for index, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise TemplateError(
                f"tool {index + 1} is {describe_json_type(tool)}, not a JSON schema",
                remedy=(
                    'write each tool as {"type": "function", "function": {"name": ...,'
                    ' "parameters": ...}}'
                ),
            )
