"""Examples to texts: conversations rendered, ends of text written, and what is known of each text's
trained part."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

from sftprep.chat_template.assistant_spans import (
    ASSISTANTS,
    TurnRule,
    TurnSpan,
    Unproven,
    derive_rule,
    is_assistant,
    marked_spans,
    turn_spans,
)
from sftprep.chat_template.compiler.statements import Pieces
from sftprep.chat_template.template import ChatTemplate, Rendered, in_characters
from sftprep.chat_template.tool_call_fallbacks import other_ways
from sftprep.config.validation import TemplateBackend
from sftprep.core.types import Example, Message, Rejected
from sftprep.errors import TemplateError
from sftprep.recipe import Recipe
from sftprep.render.rendered_batch import RenderedBatch, Span, Weight
from sftprep.render.token_space.anchors import Anchors, find_anchors
from sftprep.render.token_space.regions import RegionFinder
from sftprep.tokenize.encoders.special_tokens import MARKS, SpecialTokenScanner
from sftprep.tokenize.loading.spec import TokenizerSpec


class Renderer:
    """A recipe's template and rules, ready to run."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._closing = closing(recipe.tokenizer)
        self._shows_calls = (
            recipe.chat_template is not None and "tool_calls" in recipe.chat_template
        )
        self._spanned = recipe.train_on in ("assistant", "last-assistant")
        self._finder: RegionFinder | str = ""

    def render(
        self,
        examples: Sequence[Example],
        rejected: list[Rejected],
        counts: Counter[str],
        *,
        watch: bool = False,
    ) -> RenderedBatch:
        """The texts of all examples; those that the template refuses, or whose masks are not
        proven, are set aside.

        watch: whether any of them may spell special tokens, which are counted, or marked to become
        plain text.
        """
        # A new one for each batch: which path a record takes depends on nothing before its batch.
        self._finder = self.anchors if isinstance(self.anchors, str) else RegionFinder(self.anchors)
        out = RenderedBatch()
        if isinstance(self._finder, RegionFinder):
            out.literals = self._finder.literals
        for example in examples:
            try:
                if watch:
                    out.mark = self._watch(example, counts)
                if example.messages is not None:
                    self._chat(example, example.messages, out, counts)
                elif example.texts is not None:
                    self._several(example, example.texts, out, counts)
                else:
                    self._plain(example, out, counts)
            except TemplateError as problem:
                reason = "mask_unproven" if isinstance(problem, Unproven) else "template_error"
                rejected.append(Rejected(example.origin, 0, reason, problem.message, ""))
            except RecursionError:
                what = "its values are nested too deeply"
                rejected.append(Rejected(example.origin, 0, "template_error", what, ""))
        return out

    def ways(self) -> Counter[str]:
        """Conversations rendered so far, by the way they took."""
        used = (self.__dict__.get("_template"), self.__dict__.get("_turning"))
        return sum(
            (Counter(template.renders) for template in used if template is not None), Counter()
        )

    def check_masks(self) -> None:
        """Raises Unproven where assistant turns are to be trained and the template does not tell
        them."""
        if self._by_turn and self._template is not None:
            _ = self._rule

    @cached_property
    def _template(self) -> ChatTemplate | None:
        # Records that are plain text have no use for it.
        return self._recipe.template(anchors=self._count_anchors)

    @cached_property
    def _by_turn(self) -> bool:
        # What the template marks is what TRL trains; only what the marks do not tell is asked of
        # the turns.
        marked = self._template is not None and self._template.has_generation_marks
        return self._recipe.train_on == "last-assistant" or (
            self._recipe.train_on == "assistant" and not marked
        )

    @cached_property
    def _shows_tools(self) -> bool:
        return self._template is not None and self._template.reads("tools")

    @cached_property
    def spelled(self) -> SpecialTokenScanner:
        """The special tokens of the tokenizer, as texts may spell them."""
        return SpecialTokenScanner(self._recipe.tokenizer)

    def _watch(self, example: Example, counts: Counter[str]) -> str | None:
        """Count the texts of an example that spell special tokens; with --escape-special mark
        those, and return the mark."""
        spelled = self.spelled
        bare = [
            text.removesuffix(self._recipe.tokenizer.eos_token or "")
            for text in (example.text,)
            if text
        ]
        texts = [
            *bare,
            *(example.texts or ()),
            *(text for text in (example.prompt, example.completion) if text),
        ]
        contents: list[Any] = [
            m["content"] for m in example.messages or () if isinstance(m.get("content"), str)
        ]
        found = sum(map(spelled.is_in, texts)) + sum(map(spelled.is_in, contents))
        if found:
            counts["warnings.special_token_in_content"] += found
        messages = example.messages or ()
        # Reasoning and tool calls stand beside the content; most messages have none.
        if not self._recipe.escape_special or not (
            found or any(len(m) > 2 and spelled.any_in(m) for m in messages)
        ):
            return None
        shown = str(
            (example.text, example.texts, example.prompt, example.completion, example.messages)
        )
        mark = next((mark for mark in MARKS if mark not in shown), None)
        if mark is None:
            raise TemplateError(
                "a text holds all characters that could mark its special tokens as plain text"
            )
        example.text, example.texts = (
            spelled.marked(example.text, mark),
            spelled.marked(example.texts, mark),
        )
        example.prompt, example.completion = (
            spelled.marked(example.prompt, mark),
            spelled.marked(example.completion, mark),
        )
        if example.messages is not None:
            example.messages = [
                {**spelled.marked(m, mark), "role": m["role"]} for m in example.messages
            ]
            if example.prompt_messages is not None:
                example.prompt_messages = example.messages[: len(example.prompt_messages)]
        return mark

    # --- conversations ----------------------------------------------------------------------------

    @cached_property
    def _turning(self) -> ChatTemplate:
        """The template, noting its turns."""
        template = self._recipe.template(turns=True, anchors=self._count_anchors)
        assert template is not None
        return template

    def _count_anchors(self, text: str) -> int:
        # Called when a template is compiled, which a check of the settings does not need.
        return 0 if isinstance(self.anchors, str) else self.anchors.count(text)

    @cached_property
    def _rule(self) -> TurnRule:
        recipe = self._recipe
        specials = tuple(sorted(recipe.tokenizer.special_tokens.items()))
        return _rule_of(recipe.chat_template or "", specials, recipe.date, recipe.template_backend)

    def _chat(
        self, example: Example, messages: list[Message], out: RenderedBatch, counts: Counter[str]
    ) -> None:
        recipe = self._recipe
        template = self._template_of(example)
        if recipe.expand_turns:
            self._expanded(example, messages, out, counts)
        else:
            made, prompt = self._made(template, messages, example), None
            if example.prompt_messages is not None and recipe.train_on != "all":
                # Before anything is stored, so that a template that refuses the prompt leaves
                # nothing half done.
                prompt = self._made(template, example.prompt_messages, example, asks=True)
            if prompt is not None or self._spanned or example.weights is not None:
                self._add_trained(example, made, prompt, out, counts)
            else:
                out.add(example.origin, made.text, plain=False, spans=None, prompt=None)
        if not self._shows_calls and any(
            message.get("tool_calls") is not None for message in messages
        ):
            counts["warnings.tool_calls_not_shown"] += 1
        if example.tools and not self._shows_tools:
            counts["warnings.tools_not_shown"] += 1
        if example.prompt_messages is not None and _says_nothing(messages[-1]):
            counts["warnings.empty_target"] += 1

    def _template_of(self, example: Example) -> ChatTemplate:
        """The template that notes the turns of a conversation, if they are needed."""
        if self._by_turn or example.weights is not None:
            return self._turning
        if self._template is None:
            raise TemplateError("there is no chat template")
        return self._template

    def _add_trained(
        self,
        example: Example,
        made: Pieces | Rendered,
        prompt: Pieces | Rendered | None,
        out: RenderedBatch,
        counts: Counter[str],
    ) -> None:
        """Add a conversation of which a part is trained."""
        reason = self._place(example, made, prompt, out)
        if reason is None:
            return
        counts["masks.by_characters"] += 1
        counts[f"masks.because.{reason}"] += 1
        whole = in_characters(made)
        spans, weights = self._spans(example, whole)
        if weights:
            out.weights[len(out.texts)] = weights
        prompt_text = None if prompt is None else prompt.text
        out.add(example.origin, whole.text, plain=False, spans=spans, prompt=prompt_text)

    def _place(
        self,
        example: Example,
        made: Pieces | Rendered,
        prompt: Pieces | Rendered | None,
        out: RenderedBatch,
    ) -> str | None:
        """Add a conversation by its anchors; a reason if it has to take the reference path."""
        finder = self._finder
        if out.mark is not None or example.weights is not None:
            return "the record has weights or escaped special tokens"
        if isinstance(finder, str):
            return finder
        if isinstance(made, Rendered) or isinstance(prompt, Rendered):
            return "Jinja rendered the conversation"
        regions = self._regions(finder, made) if self._spanned else None
        if isinstance(regions, str):
            return regions
        start = None if prompt is None else finder.prompt_end(made, prompt)
        if isinstance(start, str):
            return start
        out.anchored.add(len(out.texts), made.anchors, regions, start)
        out.conversations.append(example)
        out.add(example.origin, made.text, plain=False, spans=(), prompt=None)
        return None

    def _regions(self, finder: RegionFinder, made: Pieces) -> list[int] | str:
        if not self._by_turn:
            return finder.marked(made)
        if self._turning.has_generation_marks:
            return "the template marks all turns, and only the last one is trained"
        return finder.derived(made, self._rule, self._targets_of(made.messages))

    def in_spans(self, example: Example) -> tuple[tuple[Span, ...] | None, str | None]:
        """The spans of a conversation that was added by its anchors, which the reference path
        trains, and the text of its prompt alone, None if it has none.

        It is rendered again: to keep the pieces of all conversations, of which few are asked for
        here, costs more.
        """
        template, messages = self._template_of(example), example.messages or []
        whole, prompt = self._rendered(template, messages, example), None
        if example.prompt_messages is not None:
            prompt = self._rendered(template, example.prompt_messages, example, prompt=True).text
        return self._spans(example, whole)[0], prompt

    @cached_property
    def anchors(self) -> Anchors | str:
        """The anchors of the template, or why it has none."""
        source = self._recipe.chat_template
        if self._recipe.train_on == "all":
            return "everything is trained"
        if not source:
            return "there is no template"
        # gigatoken loads byte-level tokenizers only if they have a token for every byte.
        has_bytes = self._recipe.encoder == "gigatoken"
        return find_anchors(self._recipe.tokenizer, source, has_every_byte=has_bytes)

    def _made(
        self,
        template: ChatTemplate,
        messages: list[Message],
        example: Example,
        *,
        asks: bool = False,
    ) -> Pieces | Rendered:
        """A conversation as the template renders it, or as it renders one of `other_ways`; asks:
        with the generation prompt."""
        try:
            return template.render_pieces(
                messages, example.tools, asks, example.template_kwargs, example.bare
            )
        except TemplateError:
            for other in other_ways(messages):
                try:
                    return template.render(
                        other,
                        tools=example.tools,
                        add_generation_prompt=asks,
                        template_kwargs=example.template_kwargs,
                    )
                except TemplateError:
                    # What it says of the record as it is tells the user more.
                    continue
            raise

    def _rendered(
        self,
        template: ChatTemplate,
        messages: list[Message],
        example: Example,
        *,
        prompt: bool = False,
    ) -> Rendered:
        return in_characters(self._made(template, messages, example, asks=prompt))

    def _spans(
        self, example: Example, whole: Rendered
    ) -> tuple[tuple[Span, ...] | None, list[Weight]]:
        """What is trained of a conversation, and what weighs other than 1."""
        if self._by_turn or example.weights is not None:
            return self._trained(whole, example.messages or [], example.weights)
        return (whole.spans if self._spanned else None), []

    def _trained(
        self, whole: Rendered, messages: list[Message], own: list[float | None] | None
    ) -> tuple[tuple[Span, ...] | None, list[Weight]]:
        """What is trained of a conversation, None for all, and what weighs other than 1."""
        weights = self._weights_of(messages, own)
        everything = self._recipe.train_on == "all"
        wanted = [
            number
            for number, weight in enumerate(weights)
            if (weight != 1 if everything else weight > 0)
        ]
        spans = self._spans_of(whole, messages, wanted)
        weighed = [
            (first, last, weights[number]) for first, last, number in spans if weights[number] != 1
        ]
        return (None if everything else tuple((first, last) for first, last, _ in spans)), weighed

    def _weights_of(self, messages: list[Message], own: list[float | None] | None) -> list[float]:
        """What each message weighs: what it says itself, else by --train-on; auto is the assistant
        where any message says it."""
        mode = self._recipe.train_on
        weights = [float(mode == "all")] * len(messages)
        for number in self._targets_of(messages):
            weights[number] = 1.0
        for number, weight in enumerate(own or ()):
            if weight is not None and (mode != "last-assistant" or weights[number]):
                weights[number] = weight
        return weights

    def _targets_of(self, messages: list[Message]) -> list[int]:
        """The numbers of the assistant's messages, with last-assistant only that of the last."""
        found = [k for k, message in enumerate(messages) if message.get("role") in ASSISTANTS]
        return found[-1:] if self._recipe.train_on == "last-assistant" else found

    def _spans_of(
        self, whole: Rendered, messages: list[Message], wanted: list[int]
    ) -> list[TurnSpan]:
        if not self._turning.has_generation_marks:
            return turn_spans(whole, messages, self._rule, wanted)
        # The template's own marks, of an assistant's turns; what others said stands in none.
        asked = set(wanted)
        spans = [span for span in marked_spans(whole) if span.message in asked]
        others = [number for number in wanted if not is_assistant(messages[number])]
        return (
            sorted([*spans, *turn_spans(whole, messages, self._rule, others)]) if others else spans
        )

    def _expanded(
        self, example: Example, messages: list[Message], out: RenderedBatch, counts: Counter[str]
    ) -> None:
        """One text for each turn of the assistant: all before it as its prompt, as the model sees
        it."""
        assert self._template is not None
        first = len(example.prompt_messages or ())
        weights = self._weights_of(messages, example.weights)
        made: list[tuple[Rendered, Rendered, float]] = []
        for number, message in enumerate(messages):
            # Before a turn that comes first there is nothing to answer.
            if number < max(first, 1) or not is_assistant(message) or weights[number] <= 0:
                continue
            prompt = self._rendered(self._template, messages[:number], example, prompt=True)
            whole = self._rendered(
                self._turning if self._by_turn else self._template, messages[: number + 1], example
            )
            made.append((prompt, whole, weights[number]))
            if self._spanned and self._by_turn:
                spans = self._spans_of(whole, messages[: number + 1], [number])
                made[-1] = (
                    prompt,
                    Rendered(whole.text, tuple((a, b) for a, b, _ in spans)),
                    weights[number],
                )
        for prompt, whole, weight in made:
            if weight != 1:
                out.weights[len(out.texts)] = [(0, len(whole.text), weight)]
            spans_or_all = whole.spans if self._spanned else None
            out.add(example.origin, whole.text, plain=False, spans=spans_or_all, prompt=prompt.text)
        if made:
            counts["extra.turns"] += len(made) - 1
        else:
            counts["dropped.no_assistant_turn"] += 1

    # --- plain texts ------------------------------------------------------------------------------

    def _plain(self, example: Example, out: RenderedBatch, counts: Counter[str]) -> None:
        if example.text is not None:
            out.add(example.origin, self._ended(example.text), plain=True, spans=None, prompt=None)
            return
        prompt, completion = example.prompt or "", example.completion or ""
        if not completion.strip():
            counts["warnings.empty_target"] += 1
        # Plain prompt and completion have no turns; their completion is what the assistant says.
        head = None if self._recipe.train_on == "all" else prompt
        out.add(
            example.origin, self._ended(prompt + completion), plain=True, spans=None, prompt=head
        )

    def _ended(self, text: str) -> str:
        return text if text.endswith(self._closing) else text + self._closing

    def _several(
        self, example: Example, texts: list[str], out: RenderedBatch, counts: Counter[str]
    ) -> None:
        for text in texts:
            out.add(example.origin, self._ended(text), plain=True, spans=None, prompt=None)
        counts["extra.texts"] += len(texts) - 1


def closing(spec: TokenizerSpec) -> str:
    """What is written after a plain text that does not end with it.

    The end token is written as text, as TRL does, so that it lands in the one pass of the encoder;
    a tokenizer that adds its own to every text has done it already.
    """
    return "" if spec.eos_token is None or spec.eos_token_id in spec.suffix_ids else spec.eos_token


@lru_cache(maxsize=8)
def _rule_of(
    source: str, specials: tuple[tuple[str, str], ...], date: str | None, way: TemplateBackend
) -> TurnRule:
    """The rule of a template, derived once. Raises Unproven."""
    # With a template of its own, so that the probes do not count among the renders of the records.
    day = datetime.date.fromisoformat(date) if date else None
    return derive_rule(
        ChatTemplate(source, variables=dict(specials), date=day, way=way, turns=True)
    )


def _says_nothing(message: Message) -> bool:
    content = message.get("content")
    return not (content.strip() if isinstance(content, str) else content) and not message.get(
        "tool_calls"
    )
