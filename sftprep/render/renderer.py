"""Rendering of examples to strings, by a template or with an end token.

Conversations are rendered by a template; other texts get their end token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import replace

from sftprep.chat_template.assistant_spans import Unproven
from sftprep.chat_template.compiler.compilation import RenderedPieces
from sftprep.chat_template.reasoning_tags import has_tags, remove_from_completion
from sftprep.chat_template.template import Rendered, to_rendered
from sftprep.core.omissions import (
    KEY,
    LAST_REASONING,
    MESSAGE,
    NO_REASONING,
    NO_TEXT_WITH_CALL,
    OMISSION_KINDS,
    REASONING,
    REASONING_LEFT,
    TEXT_WITH_CALL,
)
from sftprep.core.types import Counts, Example, Message, Rejected
from sftprep.errors import TemplateError
from sftprep.recipe import Recipe
from sftprep.render.conversations import ConversationRenderer
from sftprep.render.escaping import ContentEscaper
from sftprep.render.omissions.check import NO_OMISSIONS, Omissions
from sftprep.render.omissions.content_leaves import to_leaves
from sftprep.render.reasoning import (
    EMPTY_BLOCK,
    find_emptied,
    without_empty_blocks,
    without_omissible,
)
from sftprep.render.rendered_batch import RenderedBatch, Span, text_ending
from sftprep.render.templates import RecipeTemplates
from sftprep.render.token_space.anchors import Anchors
from sftprep.render.token_space.regions import RegionFinder
from sftprep.render.trained_turns import TurnSelector
from sftprep.tokenize.encoders.special_tokens import SpecialTokenScanner


class Renderer:
    """The rendering stage of a recipe.

    Args:
        recipe: The recipe, whose template and `train_on` are applied.

    Example:
        renderer.render([Example(0, text="Hi")], rejected, counts).texts  ->  ["Hi<|im_end|>"]
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self.templates = RecipeTemplates(recipe)
        self._chats = ConversationRenderer(recipe, self.templates.count_anchors)
        self._turns = TurnSelector(recipe, self.templates)
        self._escaper = ContentEscaper(recipe)
        self._ending = text_ending(recipe.tokenizer)
        # Looked up for every record.
        self._drops_reasoning = recipe.reasoning == "drop"
        self._expands_turns = recipe.expand_turns
        self._trains_empty_blocks = recipe.train_empty_thinking
        # The renderer of conversations with tools, if they have another template.
        recipe_for_tools = recipe.for_tools()
        self._for_tools = None if recipe_for_tools is None else Renderer(recipe_for_tools)
        # The fast path for the current batch, or the reason why there is none.
        self._finder: RegionFinder | str = "conversations with tools have another template"

    def render(
        self,
        examples: Sequence[Example],
        rejected: list[Rejected],
        counts: Counts,
        *,
        watched: Container[int] = (),
    ) -> RenderedBatch:
        """Render examples.

        Args:
            examples: The examples.
            rejected: Receives the examples that the template rejects, or whose mask is not proven.
            counts: Receives counts of warnings and masks.
            watched: The lines of the examples that may spell special tokens, which are then
                counted, or marked to become plain text.
        """
        # The path that a record takes must not depend on earlier batches, so each batch gets a new
        # finder.
        anchors = self.anchors
        self._finder = anchors if isinstance(anchors, str) else RegionFinder(anchors)
        batch = RenderedBatch()
        if isinstance(self._finder, RegionFinder):
            batch.literals = self._finder.literals
        for example in examples:
            try:
                if example.line in watched:
                    batch.mark = self._escaper.escape(example, counts)
                else:
                    batch.mark = None
                if example.messages is not None:
                    renderer = (example.tools and self._for_tools) or self
                    renderer._add_chat(example, example.messages, batch, rejected, counts)
                elif example.text is not None:
                    self._add_text(example, example.text, batch, counts)
                else:
                    self._add_completion(example, batch, counts)
            except TemplateError as error:
                reason = "mask_unproven" if isinstance(error, Unproven) else "template_error"
                rejected.append(Rejected(example.line, 0, reason, error.message, ""))
            except RecursionError:
                message = "its values are nested too deeply"
                rejected.append(Rejected(example.line, 0, "template_error", message, ""))
        return batch

    def backend_counts(self) -> Counter[str]:
        """Return the number of conversations rendered so far, by backend of the template."""
        counts = self.templates.backend_counts()
        return counts if self._for_tools is None else counts + self._for_tools.backend_counts()

    def check_masks(self) -> None:
        """Check that the assistant's turns can be found, if the recipe trains them.

        Raises:
            Unproven: They cannot.
        """
        if self.templates.needs_turns and self.templates.plain is not None:
            _ = self.templates.rule

    @property
    def anchors(self) -> Anchors | str:
        """The anchors of the template, or the reason why it has none."""
        return self.templates.anchors

    @property
    def special_tokens(self) -> SpecialTokenScanner:
        """The special tokens of the tokenizer, as texts may spell them."""
        return self._escaper.scanner

    def reference_spans(self, example: Example) -> tuple[tuple[Span, ...] | None, str | None]:
        """Return the spans of an anchored conversation for the reference path.

        The conversation is rendered again: to keep the pieces of all conversations would cost more,
        because few of them take the reference path after all.

        Returns:
            The spans (None: everything), and the text of the prompt alone (None if there is none).
        """
        template, messages = self.templates.template_for(example), example.messages or []
        rendered, prompt = to_rendered(self._chats.render(template, messages, example)), None
        if example.prompt_messages is not None:
            prompt = self._chats.render_prompt(template, example.prompt_messages, example).text
        return self._turns.trained_spans(example, rendered)[0], prompt

    # --- conversations ----------------------------------------------------------------------------

    def _add_chat(
        self,
        example: Example,
        messages: list[Message],
        batch: RenderedBatch,
        rejected: list[Rejected],
        counts: Counts,
    ) -> None:
        chats = self._chats
        if self._drops_reasoning:
            example = chats.drop_reasoning(example, counts)
            if self._rejects_empty_turn(messages, example, rejected, counts):
                return
            messages = example.messages or []
        example = self._turns.with_role_switches(example, messages)
        template = self.templates.template_for(example)
        if example.template_kwargs:
            chats.count_unread_variables(example, template, counts)
        if self._expands_turns:
            self._add_each_turn(example, messages, batch, rejected, counts)
            return
        rendering, prompt = chats.render(template, messages, example, counts), None
        omissions = chats.find_omissions(example, messages, template, rendering)
        if example.prompt_messages is not None and self._recipe.train_on != "all":
            # Rendered before anything is stored, so that a template that rejects the prompt
            # leaves the batch unchanged.
            prompt = chats.render_prompt(template, example.prompt_messages, example)
        if omissions.kinds and self._reject_or_count(example, omissions, batch, rejected, counts):
            return
        if (
            prompt is not None
            or self._turns.trains_spans
            or example.weights is not None
            or self._has_untrained_block(rendering.text)
        ):
            self._add_trained(example, rendering, prompt, batch, counts)
        else:
            batch.add(example.line, rendering.text, plain=False, spans=None, prompt=None)

    def _rejects_empty_turn(
        self, messages: list[Message], kept: Example, rejected: list[Rejected], counts: Counts
    ) -> bool:
        """Reject or count an example of which an answer was nothing but reasoning.

        Returns:
            Whether the example is rejected.
        """
        number = find_emptied(messages, kept.messages or ())
        if number is None:
            return False
        if not self._recipe.reject_suspects:
            counts.warn_once("empty_target", kept.line)
            return False
        counts.warn("suspects_rejected", kept.line)
        message = f"message {number} is from the assistant and is empty without its reasoning"
        rejected.append(Rejected(kept.line, 0, "empty_target", message, ""))
        return True

    def _reject_or_count(
        self,
        example: Example,
        omissions: Omissions,
        batch: RenderedBatch,
        rejected: list[Rejected],
        counts: Counts,
    ) -> bool:
        """Reject a record for its omissions, or count them.

        Returns:
            Whether the record is rejected.
        """
        fatal = omissions.rejectable.intersection(self._recipe.rejected_losses)
        for kind, what in OMISSION_KINDS.items():
            if kind in fatal:
                message = f"the chat template drops {what}"
                rejected.append(Rejected(example.line, 0, kind, message, ""))
                return True
        for kind in omissions.kinds:
            counts.warn(kind, example.line)
        if omissions.last_reasoning:
            counts.warn(LAST_REASONING, example.line)
        if REASONING in omissions.kinds and not self._chats.can_show_reasoning(
            example.messages or []
        ):
            counts.warn(NO_REASONING, example.line)
        if TEXT_WITH_CALL in omissions.kinds and not self._chats.can_show_text_with_call:
            counts.warn(NO_TEXT_WITH_CALL, example.line)
        batch.omission_lines.append(example.line)
        return False

    def _add_trained(
        self,
        example: Example,
        rendering: RenderedPieces | Rendered,
        prompt: RenderedPieces | Rendered | None,
        batch: RenderedBatch,
        counts: Counts,
    ) -> None:
        """Add a partially trained conversation, by the fast path if possible."""
        reason = self._add_anchored(example, rendering, prompt, batch)
        if reason is None:
            return
        counts["masks.by_characters"] += 1
        counts[f"masks.because.{reason}"] += 1
        rendered = to_rendered(rendering)
        spans, weights = self._turns.trained_spans(example, rendered)
        if self._has_untrained_block(rendered.text):
            spans = without_empty_blocks(spans, rendered.text)
        if weights:
            batch.weights[len(batch.texts)] = weights
        prompt_text = None if prompt is None else prompt.text
        batch.add(example.line, rendered.text, plain=False, spans=spans, prompt=prompt_text)

    def _add_anchored(
        self,
        example: Example,
        rendering: RenderedPieces | Rendered,
        prompt: RenderedPieces | Rendered | None,
        batch: RenderedBatch,
    ) -> str | None:
        """Add a conversation by its anchors, or return a reason for the reference path."""
        finder = self._finder
        if (
            batch.mark is not None
            or example.weights is not None
            or self._has_untrained_block(rendering.text)
        ):
            return "the record has weights, escaped special tokens, or blocks that are not trained"
        if isinstance(finder, str):
            return finder
        if isinstance(rendering, Rendered) or isinstance(prompt, Rendered):
            return "Jinja rendered the conversation"
        boundaries = self._turns.find_boundaries(finder, rendering, prompt)
        if isinstance(boundaries, str):
            return boundaries
        regions, start = boundaries
        batch.anchored.add(len(batch.texts), rendering.anchors, regions, start)
        batch.conversations.append(example)
        batch.add(example.line, rendering.text, plain=False, spans=(), prompt=None)
        return None

    def _has_untrained_block(self, text: str) -> bool:
        return not self._trains_empty_blocks and EMPTY_BLOCK.search(text) is not None

    def _add_each_turn(
        self,
        example: Example,
        messages: list[Message],
        batch: RenderedBatch,
        rejected: list[Rejected],
        counts: Counts,
    ) -> None:
        """Add one text for each turn of the assistant.

        Everything before the turn is its prompt, as the model sees it at inference.
        """
        assert self.templates.plain is not None
        first_target = len(example.prompt_messages or ())
        weights = self._turns.message_weights(messages, example.weights)
        turns: list[tuple[Rendered, str, float]] = []  # text with spans, prompt, weight
        omissions = NO_OMISSIONS
        known_example = replace(example, unread_texts=()) if example.unread_texts else example
        targets = self._turns.weighted_turns(messages, weights, first_target)
        # The messages, without what is checked in the sequence of an earlier turn.
        unchecked, num_checked = [*messages], 0
        # All turns are rendered before the first one is added, because the template may reject one.
        for number in targets:
            prompt = self._chats.render_prompt(self.templates.plain, messages[:number], example)
            needs_turns = self.templates.needs_turns
            template = self.templates.with_turns if needs_turns else self.templates.plain
            rendering = self._chats.render(template, messages[: number + 1], example)
            omissions |= self._chats.find_omissions(
                known_example, unchecked[: number + 1], template, rendering
            )
            checked = slice(num_checked, number + 1)
            unchecked[checked], num_checked = without_omissible(messages[checked]), number + 1
            rendered = to_rendered(rendering)
            if self._turns.trains_spans and needs_turns:
                spans = self._turns.spans_of(rendered, messages[: number + 1], [number])
                rendered = Rendered(rendered.text, tuple((first, last) for first, last, _ in spans))
            turns.append((rendered, prompt.text, weights[number]))
        texts = [rendered.text for rendered, _, _ in turns]
        if not self._chats.shows_unread_keys(example, messages, targets, texts):
            omissions |= Omissions(frozenset({KEY}))
        if omissions.kinds and self._reject_or_count(example, omissions, batch, rejected, counts):
            return
        if turns and MESSAGE not in omissions.kinds and to_leaves(messages[num_checked:], None):
            # Messages after the last turn are in no sequence. They do not reject the record: no
            # trained turn has them in its prompt.
            counts.warn(MESSAGE, example.line)
            batch.omission_lines.append(example.line)
        for rendered, prompt_text, weight in turns:
            if weight != 1:
                batch.weights[len(batch.texts)] = [(0, len(rendered.text), weight)]
            spans_or_all = rendered.spans if self._turns.trains_spans else None
            if self._has_untrained_block(rendered.text):
                spans_or_all = without_empty_blocks(spans_or_all, rendered.text)
            batch.add(
                example.line, rendered.text, plain=False, spans=spans_or_all, prompt=prompt_text
            )
        if turns:
            counts["extra.turns"] += len(turns) - 1
        else:
            counts["dropped.no_assistant_turn"] += 1

    # --- plain texts ------------------------------------------------------------------------------

    def _add_text(self, example: Example, text: str, batch: RenderedBatch, counts: Counts) -> None:
        if self._drops_reasoning and has_tags(text):
            counts.warn(REASONING_LEFT, example.line)
        batch.add(example.line, self._with_ending(text), plain=True, spans=None, prompt=None)

    def _add_completion(self, example: Example, batch: RenderedBatch, counts: Counts) -> None:
        prompt, completion = example.prompt or "", example.completion or ""
        if self._drops_reasoning:
            kept = remove_from_completion(prompt, completion)
            if kept[1] != completion:
                counts.warn("reasoning_removed", example.line)
            prompt, completion = kept
            if has_tags(completion):
                counts.warn(REASONING_LEFT, example.line)
        if not completion.strip():
            counts.warn("empty_target", example.line)
        # A plain prompt and completion have no turns: the completion is the assistant's.
        masked_prompt = None if self._recipe.train_on == "all" else prompt
        text = self._with_ending(prompt + completion)
        batch.add(example.line, text, plain=True, spans=None, prompt=masked_prompt)

    def _with_ending(self, text: str) -> str:
        return text if text.endswith(self._ending) else text + self._ending
