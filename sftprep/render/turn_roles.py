"""The role of each part of a rendered text, for display.

A conversation is rendered a second time by a template that reports its turns, because the build
needs no roles. The roles are used only if that rendering equals the text of the build.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

from sftprep.chat_template.assistant_spans import contents_of
from sftprep.chat_template.template import ChatTemplate, Rendered, to_rendered
from sftprep.core.types import Counts, Example, Message
from sftprep.errors import TemplateError
from sftprep.recipe import Recipe
from sftprep.render.conversations import ConversationRenderer


class RoleSpan(NamedTuple):
    """Characters [first, last) of a text, and the role that wrote them."""

    first: int
    last: int
    role: str  # that of the message, with the header of its turn; "" for text of the template


class RoleFinder:
    """A search for the roles in the texts of one recipe.

    Args:
        recipe: The recipe.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._chats = ConversationRenderer(recipe, lambda _: 0)
        recipe_for_tools = recipe.for_tools()
        self._for_tools = None if recipe_for_tools is None else RoleFinder(recipe_for_tools)

    def find(self, example: Example, text: str) -> list[RoleSpan]:
        """Return the roles in a text, in the order of the text; [] if they are not known.

        Args:
            example: The example that the text was rendered from.
            text: The text, with the marks that the strings of the example have.

        Example:
            find(Example(0, prompt="2 + 2 = ", completion="4"), "2 + 2 = 4<eos>")
            ->  [RoleSpan(0, 8, "prompt"), RoleSpan(8, 14, "completion")]
        """
        if example.messages is not None:
            finder = (example.tools and self._for_tools) or self
            return finder._find_turns(example, text)
        if example.text is not None:
            return [RoleSpan(0, len(text), "text")]
        prompt = example.prompt or ""
        if not text.startswith(prompt):
            return []
        spans = [RoleSpan(0, len(prompt), "prompt"), RoleSpan(len(prompt), len(text), "completion")]
        return [span for span in spans if span.first < span.last]

    @cached_property
    def _template(self) -> ChatTemplate | None:
        return self._recipe.template(turns=True)

    def _find_turns(self, example: Example, text: str) -> list[RoleSpan]:
        if self._template is None:
            return []
        if self._recipe.reasoning == "drop":
            example = self._chats.drop_reasoning(example, Counts())
        for messages in self._rendered_messages(example.messages or []):
            try:
                rendering = self._chats.render(self._template, messages, example)
            except TemplateError:  # not every order of roles is accepted
                continue
            rendered = to_rendered(rendering)
            if rendered.text == text:
                return [*_name_roles(rendered, messages)]
        return []

    def _rendered_messages(self, messages: list[Message]) -> Iterator[list[Message]]:
        """Yield the messages of which the texts of an example may consist."""
        yield messages
        if self._recipe.expand_turns:
            yield from (messages[:end] for end in range(len(messages) - 1, 1, -1))


def _name_roles(rendered: Rendered, messages: list[Message]) -> Iterator[RoleSpan]:
    """Yield the regions of a text with the roles of their messages.

    Templates often write the first message, that of the system, outside of their loop.
    """
    number_of_first = min((n for *_, n in rendered.regions if n >= 0), default=len(messages))
    for first, last, number in rendered.regions:
        before = messages[:number_of_first] if number < 0 else [messages[number]]
        text = rendered.text[first:last]
        is_written = number >= 0 or any(
            content in text for message in before for content in contents_of(message)
        )
        yield RoleSpan(first, last, str(before[0]["role"]) if is_written else "")
