"""Which turns of a conversation are trained, with their spans and loss weights."""

from __future__ import annotations

from dataclasses import replace

from sftprep.chat_template.assistant_spans import (
    ASSISTANTS,
    TurnSpan,
    find_marked_spans,
    find_turn_spans,
    is_assistant,
)
from sftprep.chat_template.compiler.compilation import RenderedPieces
from sftprep.chat_template.template import Rendered
from sftprep.config.validation import TrainRole
from sftprep.core.types import Example, Message
from sftprep.recipe import Recipe
from sftprep.records.roles import PASSED_ROLES, SYSTEM_ROLES
from sftprep.render.rendered_batch import Span, Weight
from sftprep.render.templates import RecipeTemplates
from sftprep.render.token_space.regions import Boundary, RegionFinder
from sftprep.render.turn_ends import TurnEnds

_ROLES: dict[TrainRole, frozenset[str]] = {
    "assistant": ASSISTANTS,
    "user": frozenset({"user"}),
    "system": frozenset(SYSTEM_ROLES),
    "tool": PASSED_ROLES | {"tool"},
}
"""The roles of messages by the values of `train_roles`."""


class TurnSelector:
    """The selection of the trained turns of conversations, with their spans of characters.

    Args:
        recipe: The recipe, whose `train_on` determines what is trained.
        templates: The templates that rendered the conversations.
    """

    def __init__(self, recipe: Recipe, templates: RecipeTemplates) -> None:
        self._train_on = recipe.train_on
        self._templates = templates
        self._ends = TurnEnds(recipe.tokenizer, recipe.train_end)
        self._roles = frozenset(role for name in recipe.train_roles for role in _ROLES[name])
        # Whether spans are trained, as opposed to everything or everything after a prompt.
        self.trains_spans = recipe.train_on in ("assistant", "last-assistant")

    def with_role_switches(self, example: Example, messages: list[Message]) -> Example:
        """Return a conversation with a switch for each message, if the recipe has `train_roles`.

        They have the effect of switches in the record, which take precedence.
        """
        if not self._roles:
            return example
        switches = example.weights or [None] * len(messages)
        weights: list[float | None] = [
            float(message.get("role") in self._roles) if switch is None else switch
            for message, switch in zip(messages, switches, strict=True)
        ]
        return replace(example, weights=weights)

    def trained_spans(
        self, example: Example, rendered: Rendered
    ) -> tuple[tuple[Span, ...] | None, list[Weight]]:
        """Return the trained spans, and weights other than 1.

        Returns:
            The spans (None: everything), and the weights.
        """
        if not self._templates.needs_turns and example.weights is None:
            return (rendered.spans if self.trains_spans else None), []
        messages = example.messages or []
        weights = self.message_weights(messages, example.weights)
        trains_all = self._train_on == "all"
        # With "all", the template's own text is trained too, so only exceptions are looked up.
        numbers = [
            number
            for number, weight in enumerate(weights)
            if (weight != 1 if trains_all else weight > 0)
        ]
        spans = self.spans_of(rendered, messages, numbers)
        weighted = [
            (first, last, weights[number]) for first, last, number in spans if weights[number] != 1
        ]
        # The end of a turn comes after its turn, whose weight it replaces.
        weighted += self._ends.find_excluded(spans, rendered.text)
        weighted.sort(key=lambda span: span[0])
        return (None if trains_all else tuple((first, last) for first, last, _ in spans)), weighted

    def message_weights(
        self, messages: list[Message], switches: list[float | None] | None
    ) -> list[float]:
        """Return the loss weight of each message.

        Args:
            messages: The messages.
            switches: The weights that the record itself specifies for its messages, which take
                precedence over `train_on`. If a record specifies any, "auto" means "assistant".
        """
        weights = [float(self._train_on == "all")] * len(messages)
        for number in self.target_numbers(messages):
            weights[number] = 1.0
        for number, weight in enumerate(switches or ()):
            if weight is not None and (self._train_on != "last-assistant" or weights[number]):
                weights[number] = weight
        return weights

    def weighted_turns(
        self, messages: list[Message], weights: list[float], first: int
    ) -> list[int]:
        """Return the turns of the assistant with a weight above 0, from the number `first`.

        A turn that comes first in the conversation has no prompt, and is none of them.
        """
        return [
            number
            for number, message in enumerate(messages)
            if number >= max(first, 1) and is_assistant(message) and weights[number] > 0
        ]

    def target_numbers(self, messages: list[Message]) -> list[int]:
        """Return the indices of the assistant's messages.

        For "last-assistant", it is only the last one.
        """
        found = [k for k, message in enumerate(messages) if message.get("role") in ASSISTANTS]
        return found[-1:] if self._train_on == "last-assistant" else found

    def spans_of(
        self, rendered: Rendered, messages: list[Message], numbers: list[int]
    ) -> list[TurnSpan]:
        """Return the spans of some messages.

        Raises:
            Unproven: A span does not contain its message.
        """
        templates = self._templates
        if not templates.with_turns.has_generation_marks:
            return find_turn_spans(rendered, messages, templates.rule, numbers)
        # The template marks the assistant's turns; the spans of other messages are derived.
        requested = set(numbers)
        spans = [span for span in find_marked_spans(rendered) if span.message in requested]
        others = [number for number in numbers if not is_assistant(messages[number])]
        if not others:
            return spans
        return sorted([*spans, *find_turn_spans(rendered, messages, templates.rule, others)])

    def find_boundaries(
        self, finder: RegionFinder, rendering: RenderedPieces, prompt: RenderedPieces | None
    ) -> tuple[list[int] | None, Boundary | None] | str:
        """Return what is trained in terms of anchors, or why it is not found.

        Args:
            finder: The finder of regions for the template.
            rendering: The rendered conversation.
            prompt: Its rendered prompt, if it has one.

        Returns:
            The trained regions (None if no spans are trained) and the end of the prompt.
        """
        if not finder.anchors.covers(rendering.text):
            return "the vocabulary lacks a byte of the conversation"
        regions = self._find_regions(finder, rendering) if self.trains_spans else None
        if isinstance(regions, str):
            return regions
        start = None if prompt is None else finder.prompt_end(rendering, prompt)
        return start if isinstance(start, str) else (regions, start)

    def _find_regions(self, finder: RegionFinder, rendering: RenderedPieces) -> list[int] | str:
        templates = self._templates
        if not self._ends.are_trained:
            return "tokens that end turns are not trained"
        if not templates.needs_turns:
            return finder.marked_regions(rendering)
        if templates.with_turns.has_generation_marks:
            return "the template marks all turns, and only the last one is trained"
        targets = self.target_numbers(rendering.messages)
        return finder.derived_regions(rendering, templates.rule, targets)
