"""The chat template of a recipe, in the forms for rendering."""

from __future__ import annotations

import datetime
from collections import Counter
from functools import cached_property, lru_cache

from sftprep.chat_template.assistant_spans import TurnRule, Unproven, derive_rule
from sftprep.chat_template.template import ChatTemplate
from sftprep.config.validation import TemplateBackend
from sftprep.core.types import Example
from sftprep.errors import TemplateError
from sftprep.recipe import Recipe
from sftprep.render.token_space.anchors import Anchors, find_anchors


class RecipeTemplates:
    """The template of a recipe, its turn rule and its anchors.

    Each is created when it is used.

    Args:
        recipe: The recipe.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    @cached_property
    def plain(self) -> ChatTemplate | None:
        """The template; None if the recipe has none."""
        return self._recipe.template(anchors=self.count_anchors)

    @cached_property
    def with_turns(self) -> ChatTemplate:
        """The template with reports of its turns."""
        template = self._recipe.template(turns=True, anchors=self.count_anchors)
        assert template is not None
        return template

    @cached_property
    def needs_turns(self) -> bool:
        """Whether the trained parts follow from the turns of a conversation.

        The marks of a template are what TRL trains, so turns are used only for what the marks do
        not determine.
        """
        has_marks = self.plain is not None and self.plain.has_generation_marks
        return self._recipe.train_on == "last-assistant" or (
            self._recipe.train_on == "assistant"
            and (not has_marks or self._recipe.train_end != "turn")
        )

    @cached_property
    def rule(self) -> TurnRule:
        """The turn rule of the template; raises Unproven if no rule holds."""
        recipe = self._recipe
        special_tokens = tuple(sorted(recipe.tokenizer.special_tokens.items()))
        rule = _derive_rule(
            recipe.chat_template or "", special_tokens, recipe.date, recipe.template_backend
        )
        if isinstance(rule, str):
            raise Unproven(rule)
        return rule

    @cached_property
    def anchors(self) -> Anchors | str:
        """The anchors of the template, or the reason why it has none."""
        source = self._recipe.chat_template
        if self._recipe.train_on == "all":
            return "everything is trained"
        if not source:
            return "there is no template"
        # gigatoken loads byte-level tokenizers only if they have a token for every byte.
        has_bytes = self._recipe.encoder == "gigatoken"
        return find_anchors(self._recipe.tokenizer, source, has_every_byte=has_bytes)

    def template_for(self, example: Example) -> ChatTemplate:
        """Return the template for a conversation.

        It is the one that also reports which message wrote what, if that is needed.

        Raises:
            TemplateError: The recipe has no template.
        """
        keeps_reasoning = self._recipe.reasoning == "keep"
        if self.needs_turns or keeps_reasoning or example.weights is not None:
            return self.with_turns
        if self.plain is None:
            raise TemplateError("there is no chat template")
        return self.plain

    def backend_counts(self) -> Counter[str]:
        """Return the number of conversations rendered so far, by backend."""
        # A template that has not been created yet must not be created by counting.
        used = (self.__dict__.get("plain"), self.__dict__.get("with_turns"))
        return sum(
            (Counter(template.renders) for template in used if template is not None), Counter()
        )

    def count_anchors(self, text: str) -> int:
        """Return the number of anchors in a text."""
        # Templates call this when they are compiled, so that checking the settings does not need
        # the anchors.
        return 0 if isinstance(self.anchors, str) else self.anchors.count(text)


@lru_cache(maxsize=8)
def _derive_rule(
    source: str,
    special_tokens: tuple[tuple[str, str], ...],
    date: str | None,
    backend: TemplateBackend,
) -> TurnRule | str:
    """Return the rule of a template, or why there is none.

    Both take equally long to find, so both are cached.
    """
    # A separate template, so that the probes do not count among the renders of the records.
    day = datetime.date.fromisoformat(date) if date else None
    try:
        return derive_rule(
            ChatTemplate(
                source, variables=dict(special_tokens), date=day, backend=backend, turns=True
            )
        )
    except Unproven as error:
        return error.message
