"""Rendering of one conversation under a recipe, and the check for omissions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import jinja2

from sftprep.chat_template.assistant_spans import is_assistant
from sftprep.chat_template.compiler.compilation import RenderedPieces
from sftprep.chat_template.reasoning_tags import has_tags
from sftprep.chat_template.reference.content_forms import to_parts
from sftprep.chat_template.reference.rendering import REASONING_KEYS, find_variables
from sftprep.chat_template.template import ChatTemplate, Rendered, to_rendered
from sftprep.chat_template.tool_call_fallbacks import alternative_forms, find_unusual
from sftprep.core.omissions import REASONING_LEFT, VARIABLE_NOT_READ
from sftprep.core.types import Counts, Example, Message
from sftprep.errors import TemplateError
from sftprep.recipe import Recipe
from sftprep.render.omissions.check import (
    NO_OMISSIONS,
    ConservationCheck,
    Conversation,
    Omissions,
)
from sftprep.render.omissions.written_contents import WrittenContents
from sftprep.render.reasoning import (
    find_ends,
    find_insertions,
    has_reasoning,
    insert_into_pieces,
    insert_into_text,
    is_reasoning_shown,
    is_text_with_call_shown,
    without_reasoning,
)


class ConversationRenderer:
    """A renderer of conversations, including the reasoning of earlier turns.

    The recipe specifies how that reasoning is treated.

    Args:
        recipe: The recipe.
        count_anchors: Returns the number of anchors in a string.
    """

    def __init__(self, recipe: Recipe, count_anchors: Callable[[str], int]) -> None:
        self._recipe = recipe
        self._keeps_reasoning = recipe.reasoning == "keep"
        self._count_anchors = count_anchors
        self._written = WrittenContents(self._render_pieces)
        self._shown_reasoning: dict[bool, bool] = {}  # by whether the reasoning is in tags
        self._ends: dict[ChatTemplate, tuple[str, str]] = {}  # of turns; see `find_ends`

    def render(
        self,
        template: ChatTemplate,
        messages: list[Message],
        example: Example,
        counts: Counts | None = None,
    ) -> RenderedPieces | Rendered:
        """Render a conversation.

        Args:
            template: The template; with `reasoning="keep"`, one that reports its turns.
            messages: The messages.
            example: The example that they belong to, with its tools and variables.
            counts: Receives a warning if reasoning could not be kept.

        Raises:
            TemplateError: The template rejects the conversation.
        """
        rendering = self._render(template, messages, example, False)
        if self._keeps_reasoning:
            return self._keep_reasoning(template, rendering, messages, example, counts)
        return rendering

    def render_prompt(
        self, template: ChatTemplate, messages: list[Message], example: Example
    ) -> RenderedPieces | Rendered:
        """Render the messages before a turn of the assistant, and the start of this turn."""
        rendering = self._render(template, messages, example, True)
        if self._keeps_reasoning:
            return self._keep_reasoning(template, rendering, messages, example, None)
        return rendering

    def drop_reasoning(self, example: Example, counts: Counts) -> Example:
        """Return an example without reasoning, and count it if it had any."""
        messages, prompt = example.messages or [], example.prompt_messages
        kept = [*map(without_reasoning, messages)]
        if any(is_assistant(message) and has_tags(message.get("content")) for message in kept):
            counts.warn(REASONING_LEFT, example.line)
        if kept == messages:
            return example
        counts.warn("reasoning_removed", example.line)
        return replace(
            example, messages=kept, prompt_messages=None if prompt is None else kept[: len(prompt)]
        )

    def find_omissions(
        self,
        example: Example,
        messages: list[Message],
        template: ChatTemplate,
        rendering: RenderedPieces | Rendered,
    ) -> Omissions:
        """Return the content of messages dropped by the last render of a template."""
        # This decides most records.
        if type(rendering) is RenderedPieces:
            pieces = rendering.pieces
            if (
                example.bare
                and example.tools is None
                and not example.unread_texts
                and self._written.has_all(messages, pieces)
            ):
                return NO_OMISSIONS
        else:
            pieces = []
        return self._conservation.find_omissions(
            Conversation(messages, example.tools, example.template_kwargs),
            rendering.text,
            pieces,
            template.written_as_json,
            example.unread_texts,
        )

    def shows_unread_keys(
        self, example: Example, messages: list[Message], last_turns: list[int], rendered: list[str]
    ) -> bool:
        """Return whether renderings of the first messages show the unread texts of an example.

        See `ConservationCheck.shows_unread_keys`.
        """
        conversation = Conversation(messages, example.tools, example.template_kwargs)
        return not example.unread_texts or self._conservation.shows_unread_keys(
            conversation, last_turns, example.unread_texts, rendered
        )

    def can_show_reasoning(self, messages: list[Message]) -> bool:
        """Return whether the template shows reasoning in the form of some messages at all."""
        forms = {
            not any(message.get(key) for key in REASONING_KEYS)
            for message in messages
            if has_reasoning(message)
        }
        return not forms or any(map(self._shows_reasoning, forms))

    def _shows_reasoning(self, in_tags: bool) -> bool:
        if in_tags not in self._shown_reasoning:
            self._shown_reasoning[in_tags] = is_reasoning_shown(self._render_probe, in_tags=in_tags)
        return self._shown_reasoning[in_tags]

    @cached_property
    def can_show_text_with_call(self) -> bool:
        """Whether the template shows the text alongside a call at all."""
        return is_text_with_call_shown(self._render_probe)

    def _render_probe(self, messages: list[Message]) -> str:
        return to_rendered(self._render(self._probed, messages, Example(0), False)).text

    def _render_pieces(self, messages: list[Message]) -> Sequence[str]:
        try:
            rendering = self._render(self._probed, messages, Example(0, bare=True), False)
        except TemplateError:  # not every order of roles is accepted
            return ()
        return rendering.pieces if isinstance(rendering, RenderedPieces) else ()

    @cached_property
    def _probed(self) -> ChatTemplate:
        # A template of its own, since its renderings are not those of records.
        template = self._recipe.template()
        assert template is not None
        return template

    def count_unread_variables(
        self, example: Example, template: ChatTemplate, counts: Counts
    ) -> None:
        """Count an example with a variable that its template does not read."""
        read = find_variables(template.source)
        variables = example.template_kwargs or {}
        if any(name not in read and variables[name] is not None for name in variables):
            counts.warn(VARIABLE_NOT_READ, example.line)

    @cached_property
    def _conservation(self) -> ConservationCheck:
        # A template of its own, since its renderings are not those of records.
        template = self._recipe.template(turns=self._keeps_reasoning)
        assert template is not None

        def render(conversation: Conversation) -> str:
            messages, tools, variables = conversation
            example = Example(0, tools=tools, template_kwargs=variables)
            return self.render(template, messages, example).text

        return ConservationCheck(render, template.source)

    def _keep_reasoning(
        self,
        template: ChatTemplate,
        rendering: RenderedPieces | Rendered,
        messages: list[Message],
        example: Example,
        counts: Counts | None,
    ) -> RenderedPieces | Rendered:
        """Insert the reasoning of earlier turns into a rendering."""
        rendered = to_rendered(rendering)

        def render_until(number: int) -> Rendered:
            return to_rendered(self._render(template, messages[:number], example, False))

        if template not in self._ends:
            self._ends[template] = find_ends(template.render)
        insertions, unproven = find_insertions(
            rendered, messages, render_until, self._ends[template]
        )
        if unproven and counts is not None:
            counts.warn("keep_unproven", example.line)
        if not insertions:
            return rendering
        if isinstance(rendering, RenderedPieces):
            return insert_into_pieces(rendering, insertions, self._count_anchors)
        return insert_into_text(rendered, insertions)

    def _render(
        self,
        template: ChatTemplate,
        messages: list[Message],
        example: Example,
        with_generation_prompt: bool,
    ) -> RenderedPieces | Rendered:
        """Render a conversation, or an alternative form accepted by the template."""
        if template.part_roles:
            messages = to_parts(messages, template.part_roles)
        try:
            return template.render_pieces(
                messages,
                example.tools,
                with_generation_prompt,
                example.template_kwargs,
                example.bare,
            )
        except TemplateError as error:
            for alternative, tools in alternative_forms(messages, example.tools):
                try:
                    return template.render(
                        alternative,
                        tools=tools,
                        add_generation_prompt=with_generation_prompt,
                        template_kwargs=example.template_kwargs,
                    )
                except TemplateError:
                    # The error about the record's own form says more to the user.
                    continue
            # A template that failed, as opposed to one that raised an error of its own, did not
            # expect the form of some value.
            has_failed = type(error.__cause__) not in (type(None), jinja2.TemplateError)
            unusual = find_unusual(messages, example.tools) if has_failed else None
            if unusual is None:
                raise
            raise TemplateError(f"{error.message}: {unusual}", remedy=error.remedy) from error
