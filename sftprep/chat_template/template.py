"""Rendering of conversations by chat templates.

A template is compiled where that is exact; otherwise Jinja renders.
"""

from __future__ import annotations

import copy
import datetime
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import accumulate
from typing import Any, Literal

from jinja2 import nodes

from sftprep.chat_template.compiler.compilation import (
    RenderedPieces,
    RenderFunction,
    compile_pieces,
)
from sftprep.chat_template.compiler.runtime import JinjaFallback
from sftprep.chat_template.reference.content_forms import find_part_roles, find_shown_roles
from sftprep.chat_template.reference.rendering import (
    OUTPUT_FLOOR,
    check_output,
    check_tools,
    compile_template,
    normalize_messages,
    run_template,
)
from sftprep.chat_template.reference.sandbox import ChatEnvironment
from sftprep.chat_template.reference.turn_tracking import Region, regions_of
from sftprep.config.validation import RESERVED_VARIABLES
from sftprep.core.types import Message
from sftprep.errors import TemplateError

CHECKED_FIRST = 16
"""The number of renders at the start that are repeated with Jinja for comparison."""
CHECKED_EVERY = 1_000
"""After those, one render out of this number is repeated."""
CHECKED_SHAPES = 32
"""The first render of each shape of conversation is repeated too, up to this number of shapes."""
CHECKED_MESSAGES = 500
"""Once this number of messages has been rendered twice, only one render in CHECKED_EVERY is
repeated: Jinja takes 0.1 ms for each message."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text, with positions in characters."""

    text: str
    spans: tuple[tuple[int, int], ...]  # [first, last) of each `{% generation %}` block, in order
    regions: tuple[Region, ...] = ()  # which message wrote what, if the template reports its turns


class ChatTemplate:
    """A chat template with the variables of its tokenizer.

    The text, the spans and the rejections are those of `apply_chat_template` in transformers 5.23.
    The compiled template is compared with Jinja while it is used. After any difference it is
    disabled, which `report` shows.

    An instance renders one conversation at a time, so each thread needs its own.

    Example:
        template = ChatTemplate("{% for m in messages %}{{ m.content }};{% endfor %}", variables={})
        template.render([{"role": "user", "content": "Hi"}]).text  ->  "Hi;"
    """

    def __init__(
        self,
        source: str,
        *,
        variables: Mapping[str, str],
        date: datetime.date | None = None,
        backend: Literal["auto", "jinja"] = "auto",
        turns: bool = False,
        anchors: Callable[[str], int] | None = None,
    ) -> None:
        """Parse a template.

        Args:
            source: The Jinja source.
            variables: The special tokens of the tokenizer, by the names that templates use.
            date: The date that templates see as today.
            backend: "jinja" disables the compiled template.
            turns: Whether renders report which message wrote what (`Rendered.regions`).
            anchors: Returns the number of anchors in a string, that is, of the tokens that can mark
                the boundaries of trained regions (`RenderedPieces.anchors`).

        Raises:
            TemplateError: The source is not a template; with the line.
        """
        self.source = source
        self.digest = sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
        self._environment = ChatEnvironment(date or datetime.date.today())
        self._parsed = compile_template(self._environment, source, turns=turns)
        self.has_generation_marks = self._parsed.has_marks
        self._variables: dict[str, Any] = {"documents": None, **variables}
        self._count_anchors = anchors or (lambda _: 0)
        self._needs_compilation = backend == "auto"  # postponed until the first render
        self._compiled: RenderFunction | None = None  # None: not compiled yet, or not used
        self._why_jinja = "disabled by the caller"  # why the compiled template is not used
        self._constructs: tuple[str, ...] = ()  # parts that only Jinja can run
        # Renders so far, by backend; how many of the compiled ones were repeated with Jinja, and
        # the number of messages in those.
        self._num_compiled = self._num_jinja = self._num_checks = self._num_checked_messages = 0
        self._fallbacks: Counter[str] = Counter()  # why single conversations were left to Jinja
        self._checked_shapes: set[tuple[int, int, bool, bool]] = set()
        self._mismatch: dict[str, Any] | None = None  # the check that failed

    def render(
        self,
        messages: list[Message],
        tools: list[Any] | None = None,
        *,
        add_generation_prompt: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        is_bare: bool = False,
    ) -> Rendered:
        """Render a conversation.

        Args:
            messages: The messages; like the next two arguments, plain JSON values, which are not
                modified.
            tools: JSON schemas.
            add_generation_prompt: Whether the text ends with the start of an assistant turn.
            template_kwargs: Further variables, which override those of the tokenizer.
            is_bare: It is known that no message has more than a role and one other key, so that
                none contains reasoning.

        Raises:
            TemplateError: The template rejects the conversation (with the template's own message),
                or it fails.
        """
        return to_rendered(
            self.render_pieces(messages, tools, add_generation_prompt, template_kwargs, is_bare)
        )

    def render_pieces(
        self,
        messages: list[Message],
        tools: list[Any] | None = None,
        add_generation_prompt: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        is_bare: bool = False,
    ) -> RenderedPieces | Rendered:
        """Render a conversation as `render` does, and return the pieces of the text.

        A conversation that Jinja rendered has no pieces.
        """
        self._environment.written_as_json = []
        messages = messages if is_bare else normalize_messages(messages)
        variables = self._with_kwargs(template_kwargs) if template_kwargs else self._variables
        if tools is not None:
            check_tools(tools)
        if self._needs_compilation:
            self._compile()
        if self._compiled is not None and not (
            template_kwargs and self._shadows_global(template_kwargs)
        ):
            try:
                pieces = self._compiled(messages, tools, add_generation_prompt, variables)
            except JinjaFallback as fallback:
                self._fallbacks[fallback.reason] += 1
            except Exception as error:
                # Whatever went wrong, Jinja finds the same error and reports it in its own words,
                # or it renders what the compiled template cannot.
                self._fallbacks[type(error).__name__] += 1
            else:
                if len(pieces.text) > OUTPUT_FLOOR:
                    check_output(
                        len(pieces.text), {**variables, "messages": messages, "tools": tools}
                    )
                self._num_compiled += 1
                # The first condition is a cheap one, which is False for nearly all renders.
                if (
                    self._num_compiled % CHECKED_EVERY == 0
                    or self._num_checked_messages <= CHECKED_MESSAGES
                ) and self._needs_check(messages, tools, add_generation_prompt, is_bare):
                    fast = to_rendered(pieces)
                    checked = self._compare_with_jinja(
                        messages, tools, add_generation_prompt, variables, fast
                    )
                    if checked is not fast:
                        return checked
                return pieces
        self._num_jinja += 1
        return self._render_with_jinja(messages, tools, add_generation_prompt, variables)

    @property
    def written_as_json(self) -> Sequence[tuple[Any, str]]:
        """Return the values passed to the filter `tojson` by the last render.

        Each value is paired with its result. Each render has a list of its own.
        """
        return self._environment.written_as_json

    def shown_roles(self, roles: frozenset[str]) -> frozenset[str]:
        """Select the roles of tool results shown by the template."""
        return find_shown_roles(self._render_probe, roles)

    @cached_property
    def part_roles(self) -> frozenset[str]:
        """Return the roles with contents shown only as parts; see `to_parts`."""
        return find_part_roles(self._render_probe)

    def _render_probe(self, messages: list[Message]) -> str:
        return self._render_with_jinja(messages, None, False, self._variables).text

    def used_backend(self) -> str:
        """Return the backend in use: "pieces" (compiled), "jinja" or "mixed".

        Before the first render, return the backend that it would use.
        """
        if self._num_compiled and self._num_jinja:
            return "mixed"
        if self._num_compiled or self._num_jinja:
            return "pieces" if self._num_compiled else "jinja"
        if self._needs_compilation:
            self._compile()
        return "jinja" if self._compiled is None else "pieces"

    @property
    def tree(self) -> nodes.Template:
        """The parsed source."""
        return self._parsed.tree

    @property
    def renders(self) -> dict[str, int]:
        """Return the number of conversations rendered so far, by backend."""
        return {"pieces": self._num_compiled, "jinja": self._num_jinja}

    def report(self) -> dict[str, Any]:
        """Return how the template was used, as JSON values.

        Returns:
            backend: As `used_backend()`.
            possible: The backend that the next render uses.
            why_jinja: Why the compiled template is not used, or None.
            renders: Number of renders by backend, and of those that were compared with Jinja.
            fallbacks: Why single conversations were left to Jinja, with their numbers.
            only_jinja: Parts of the template that were not compiled, with their lines.
            mismatch: The comparison that failed, or None.
        """
        backend = self.used_backend()
        return {
            "backend": backend,
            "possible": "jinja" if self._compiled is None else "pieces",
            "why_jinja": self._why_jinja if self._compiled is None else None,
            "renders": {**self.renders, "checked": self._num_checks},
            "fallbacks": dict(sorted(self._fallbacks.items())),
            "only_jinja": list(self._constructs),
            "mismatch": self._mismatch,
        }

    def _compile(self) -> None:
        """Compile the template, before its first render."""
        self._needs_compilation = False
        try:
            compiled = compile_pieces(
                self._parsed.tree,
                self._parsed.template,
                self._environment,
                anchors=self._count_anchors,
                special=self._variables.keys(),
            )
        except Exception as error:
            # The template is nested too deeply for Python, or the compiler has a fault. Jinja runs
            # the template, and the report shows the reason.
            self._why_jinja = f"the template cannot be compiled: {type(error).__name__}: {error}"
        else:
            self._compiled, self._constructs = compiled.render, compiled.constructs

    def _with_kwargs(self, template_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the variables of the tokenizer, overridden by those of the record."""
        reserved = RESERVED_VARIABLES.intersection(template_kwargs)
        if reserved:
            name = min(reserved)
            raise TemplateError(
                f"chat_template_kwargs contains {name!r}, which is not a variable of templates",
                remedy=f"remove {name!r} from chat_template_kwargs",
            )
        return {**self._variables, **template_kwargs}

    def _shadows_global(self, template_kwargs: Mapping[str, Any]) -> bool:
        """Return whether a variable has the name of one of Jinja's functions."""
        return not self._environment.globals.keys().isdisjoint(template_kwargs)

    def _render_with_jinja(
        self,
        messages: list[Message],
        tools: list[Any] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> Rendered:
        arguments = {
            **variables,
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        if self._parsed.mutates_input:
            arguments = copy.deepcopy(arguments)
        text, spans = run_template(self._environment, self._parsed.template, arguments)
        marks = self._environment.generation.turns
        # The marks refer to the messages that the template saw, which may be copies.
        regions = regions_of(marks, arguments["messages"], len(text)) if marks else ()
        return Rendered(text, spans, regions)

    def _needs_check(
        self,
        messages: list[Message],
        tools: list[Any] | None,
        add_generation_prompt: bool,
        is_bare: bool,
    ) -> bool:
        """Return whether to repeat this render with Jinja.

        This is so for one in CHECKED_EVERY, the first renders, and the first of each shape.
        """
        if self._num_compiled % CHECKED_EVERY == 0:
            return True
        most_keys = 2 if is_bare else max(map(len, messages), default=0)
        shape = (len(messages), most_keys, tools is None, add_generation_prompt)
        if shape in self._checked_shapes:
            return self._num_compiled <= CHECKED_FIRST
        is_new = len(self._checked_shapes) < CHECKED_SHAPES
        if is_new:
            self._checked_shapes.add(shape)
        return is_new or self._num_compiled <= CHECKED_FIRST

    def _compare_with_jinja(
        self,
        messages: list[Message],
        tools: list[Any] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
        fast: Rendered,
    ) -> Rendered:
        """Repeat a render with Jinja.

        If the result differs, return Jinja's and disable the compiled template.
        """
        self._num_checks += 1
        self._num_checked_messages += len(messages)
        try:
            slow: Rendered | TemplateError = self._render_with_jinja(
                messages, tools, add_generation_prompt, variables
            )
        except TemplateError as error:
            slow = error
        if slow == fast:
            return fast
        self._mismatch = {
            "render": self._num_compiled + self._num_jinja,
            "messages": len(messages),
        }
        self._why_jinja = (
            "a compiled render differed from Jinja's; not all earlier renders were compared"
        )
        self._compiled = None
        if isinstance(slow, TemplateError):
            raise slow
        return slow


def to_rendered(rendering: RenderedPieces | Rendered) -> Rendered:
    """Return a rendered conversation with positions in characters instead of pieces."""
    if isinstance(rendering, Rendered):
        return rendering
    if not (rendering.marks or rendering.turns):
        return Rendered(rendering.text, ())
    offsets = [0, *accumulate(map(len, rendering.pieces))]  # offset of each piece in the text
    # Every second entry of `marks` is a number of anchors, which is not needed here.
    marks = [offsets[piece] for piece in rendering.marks[::2]]
    positions = [offsets[piece] for piece in rendering.turns[::4]]
    turns = [*zip(positions, rendering.turns[2::4], rendering.turns[3::4], strict=True)]
    return Rendered(
        rendering.text,
        tuple(zip(marks[::2], marks[1::2], strict=True)),
        regions_of(turns, rendering.messages, len(rendering.text)) if turns else (),
    )
