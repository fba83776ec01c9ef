"""A chat template, ready to turn conversations into text: compiled to pieces where that is exact,
run by Jinja otherwise."""

from __future__ import annotations

import copy
import datetime
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate
from typing import Any, Literal

from jinja2 import nodes

from sftprep.chat_template.compiler.runtime import JinjaFallback
from sftprep.chat_template.compiler.statements import Pieces, Render, compile_pieces
from sftprep.chat_template.reference.sandbox import (
    OUTPUT_FLOOR,
    ChatEnvironment,
    as_templates_get,
    check_output,
    compile_template,
    run_template,
)
from sftprep.chat_template.reference.turn_tracking import Region, regions_of
from sftprep.core.types import Message
from sftprep.errors import TemplateError

CHECKED_FIRST = 16
"""Renders of a template, from the first on, that Jinja repeats for comparison."""
CHECKED_EVERY = 1_000
"""After those, one render in so many is repeated."""
CHECKED_SHAPES = 32
"""And the first of each shape of conversation, up to so many shapes."""
CHECKED_MESSAGES = 500
"""All that until so many messages have been rendered twice: Jinja takes 0.1 ms for each."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text. spans: character ranges [first, last+1) that `{% generation %}`
    marks, in order; regions: which message wrote what, where the template notes turns."""

    text: str
    spans: tuple[tuple[int, int], ...]
    regions: tuple[Region, ...] = ()


class ChatTemplate:
    """A chat template with the variables of its tokenizer. Renders one conversation at a time: one
    instance a thread.

    The text, the spans and the refusals are those of transformers 5.23 `apply_chat_template`. The
    compiled way is checked against Jinja while it runs; on any difference it is switched off, and
    `report` says so.
    """

    def __init__(
        self,
        source: str,
        *,
        variables: Mapping[str, str],
        date: datetime.date | None = None,
        way: Literal["auto", "jinja"] = "auto",
        turns: bool = False,
        anchors: Callable[[str], int] | None = None,
    ) -> None:
        """variables: the tokenizer's special tokens, by the names that templates know; date: what
        templates see as today; turns: renders tell which message wrote what; anchors: counts the
        tokens in a text that can mark the boundaries of trained regions (`Pieces.anchors`).

        Raises TemplateError, with the line, where the source is no template.
        """
        self.source = source
        self.digest = sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
        self._environment = ChatEnvironment(date or datetime.date.today())
        self._parsed = compile_template(self._environment, source, turns=turns)
        self.has_generation_marks = self._parsed.marks
        self._variables: dict[str, Any] = {"documents": None, **variables}
        self._anchors = anchors or (lambda _: 0)
        self._pieces: Render | None = None
        self._why_jinja = "asked for"
        self._constructs: tuple[str, ...] = ()
        self._to_compile = way == "auto"
        self._by_pieces = self._by_jinja = self._checks = self._checked_messages = 0
        self._handed_over: Counter[str] = Counter()
        self._shapes: set[tuple[int, int, bool, bool]] = set()
        self._mismatch: dict[str, Any] | None = None

    def render(
        self,
        messages: list[Message],
        tools: list[Any] | None = None,
        *,
        add_generation_prompt: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        bare: bool = False,
    ) -> Rendered:
        """Turn one conversation into text.

        messages, tools and template_kwargs are plain JSON values, which are not changed; bare: no
        message has more than a role and one thing beside it, so that none brings reasoning. Raises
        TemplateError where the template refuses the conversation, with its own message, and where
        it fails.
        """
        return in_characters(
            self.render_pieces(messages, tools, add_generation_prompt, template_kwargs, bare)
        )

    def render_pieces(
        self,
        messages: list[Message],
        tools: list[Any] | None = None,
        add_generation_prompt: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        bare: bool = False,
    ) -> Pieces | Rendered:
        """As `render`, with the pieces of the text; what Jinja rendered has none."""
        messages = messages if bare else as_templates_get(messages)
        variables = self._given(template_kwargs) if template_kwargs else self._variables
        if tools is not None:
            _check_tools(tools)
        if self._to_compile:
            self._compile()
        if self._pieces is not None and not (template_kwargs and self._shadows(template_kwargs)):
            try:
                made = self._pieces(messages, tools, add_generation_prompt, variables)
            except JinjaFallback as way:
                self._handed_over[way.reason] += 1
            except Exception as error:
                # Whatever went wrong, Jinja finds the same and says it in its own words, or renders
                # what pieces cannot.
                self._handed_over[type(error).__name__] += 1
            else:
                if len(made.text) > OUTPUT_FLOOR:
                    check_output(
                        len(made.text), {**variables, "messages": messages, "tools": tools}
                    )
                self._by_pieces += 1
                if (
                    self._by_pieces % CHECKED_EVERY == 0
                    or self._checked_messages <= CHECKED_MESSAGES
                ) and self._is_checked(messages, tools, add_generation_prompt):
                    fast = in_characters(made)
                    slow = self._checked(messages, tools, add_generation_prompt, variables, fast)
                    if slow is not fast:
                        return slow
                return made
        self._by_jinja += 1
        return self._run(messages, tools, add_generation_prompt, variables)

    def reads(self, name: str) -> bool:
        """Whether the template looks at a variable, such as `tools`."""
        return any(
            node.name == name and node.ctx == "load"
            for node in self._parsed.tree.find_all(nodes.Name)
        )

    def way(self) -> str:
        """Which way the renders so far took: pieces, jinja or mixed; before the first, the way that
        it would try."""
        if self._by_pieces and self._by_jinja:
            return "mixed"
        if self._by_pieces or self._by_jinja:
            return "pieces" if self._by_pieces else "jinja"
        if self._to_compile:
            self._compile()
        return "jinja" if self._pieces is None else "pieces"

    @property
    def renders(self) -> dict[str, int]:
        """How many conversations were rendered so far by pieces, and how many by jinja."""
        return {"pieces": self._by_pieces, "jinja": self._by_jinja}

    def report(self) -> dict[str, Any]:
        """For the manifest: JSON values only.

        way: as `way()`; possible: whether pieces are in use; why_jinja: why not; renders: how many
        by each way, and how many of those by pieces were checked; handed_over: why single
        conversations went to Jinja; only_jinja: parts of the template that were not compiled, with
        their lines; mismatch: the check that failed.
        """
        way = self.way()
        return {
            "way": way,
            "possible": "jinja" if self._pieces is None else "pieces",
            "why_jinja": self._why_jinja if self._pieces is None else None,
            "renders": {
                "pieces": self._by_pieces,
                "jinja": self._by_jinja,
                "checked": self._checks,
            },
            "handed_over": dict(sorted(self._handed_over.items())),
            "only_jinja": list(self._constructs),
            "mismatch": self._mismatch,
        }

    def _compile(self) -> None:
        """Compile the template, when it renders for the first time."""
        self._to_compile = False
        try:
            compiled = compile_pieces(
                self._parsed.tree,
                self._parsed.template,
                self._environment,
                anchors=self._anchors,
                special=self._variables.keys(),
            )
        except Exception as error:
            # Nested too deeply for Python, or a kind of template that nobody thought of: Jinja runs
            # it, and the report says so.
            self._why_jinja = f"the template cannot be compiled: {type(error).__name__}: {error}"
        else:
            self._pieces, self._constructs = compiled.render, compiled.constructs

    def _given(self, template_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The variables of the tokenizer, and over them those of the record."""
        taken = _PARAMETERS.intersection(template_kwargs)
        if taken:
            name = min(taken)
            raise TemplateError(
                f"chat_template_kwargs has {name!r}, which is no variable of templates",
                remedy=f"take {name!r} out of chat_template_kwargs",
            )
        return {**self._variables, **template_kwargs}

    def _shadows(self, template_kwargs: Mapping[str, Any]) -> bool:
        """Whether a variable has the name of one of Jinja's functions."""
        return not self._environment.globals.keys().isdisjoint(template_kwargs)

    def _run(
        self,
        messages: list[Message],
        tools: list[Any] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> Rendered:
        given = {
            **variables,
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        if self._parsed.writes:
            given = copy.deepcopy(given)
        text, spans = run_template(self._environment, self._parsed.template, given)
        turns = self._environment.generation.turns
        return Rendered(
            text, spans, regions_of(turns, given["messages"], len(text)) if turns else ()
        )

    def _is_checked(
        self, messages: list[Message], tools: list[Any] | None, add_generation_prompt: bool
    ) -> bool:
        """Whether this render is the one in CHECKED_EVERY, or one of the first, or the first of its
        shape."""
        if self._by_pieces % CHECKED_EVERY == 0:
            return True
        longest = max(map(len, messages), default=0)
        shape = (len(messages), longest, tools is None, add_generation_prompt)
        is_new = shape not in self._shapes and len(self._shapes) < CHECKED_SHAPES
        if is_new:
            self._shapes.add(shape)
        return is_new or self._by_pieces <= CHECKED_FIRST

    def _checked(
        self,
        messages: list[Message],
        tools: list[Any] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
        fast: Rendered,
    ) -> Rendered:
        """Render with Jinja too; where it differs, use Jinja from now on."""
        self._checks += 1
        self._checked_messages += len(messages)
        try:
            slow: Rendered | TemplateError = self._run(
                messages, tools, add_generation_prompt, variables
            )
        except TemplateError as error:
            slow = error
        if slow == fast:
            return fast
        self._mismatch = {"render": self._by_pieces + self._by_jinja, "messages": len(messages)}
        self._why_jinja = (
            "a render by pieces differed from Jinja's; renders before it were not all compared"
        )
        self._pieces = None
        if isinstance(slow, TemplateError):
            raise slow
        return slow


_PARAMETERS = frozenset(
    {
        "messages",
        "conversation",
        "conversations",
        "tools",
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
    }
    | {
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
    }
)
"""Parameters of `apply_chat_template`: under these names nothing reaches a template."""


def in_characters(made: Pieces | Rendered) -> Rendered:
    """A rendered conversation with its positions in characters."""
    if isinstance(made, Rendered):
        return made
    if not (made.marks or made.turns):
        return Rendered(made.text, ())
    starts = [0, *accumulate(map(len, made.pieces))]
    marks = [starts[piece] for piece in made.marks[::2]]
    places = [starts[piece] for piece in made.turns[::4]]
    turns = [*zip(places, made.turns[2::4], made.turns[3::4], strict=True)]
    return Rendered(
        made.text,
        tuple(zip(marks[::2], marks[1::2], strict=True)),
        regions_of(turns, made.messages, len(made.text)) if turns else (),
    )


def _check_tools(tools: list[Any]) -> None:
    for index, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise TemplateError(
                f"tool {index + 1} is a {type(tool).__name__}, not a JSON schema",
                remedy=(
                    'write each tool as {"type": "function", "function": {"name": ...,'
                    ' "parameters": ...}}'
                ),
            )
