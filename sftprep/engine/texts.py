"""Examples to texts: conversations rendered, ends of text written, and what is known of each text's
trained part."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from sftprep.batch import Example, Message, Rejected
from sftprep.chat.other_ways import other_ways
from sftprep.chat.spans import (
    TurnRule,
    TurnSpan,
    Unproven,
    derive_rule,
    is_assistant,
    marked_spans,
    turn_spans,
)
from sftprep.chat.template import ChatTemplate, Rendered
from sftprep.engine.framed import Framed
from sftprep.engine.recipe import Recipe
from sftprep.errors import TemplateError
from sftprep.sources.jsonl import excerpt
from sftprep.tokenize.escaped import MARKS, Marked, Spelled
from sftprep.tokenize.spec import TokenizerSpec

Span = tuple[int, int]
Weight = tuple[int, int, float]
"""Characters [first, last) of a text, and what their tokens weigh in the loss; 0: they are not
trained."""


@dataclass(slots=True)
class Texts:
    """Rendered examples, side by side: text k is of record line origin[k]; plain texts get the
    tokenizer's own prefix and suffix, rendered conversations do not; prompts[j] is the prompt of
    text prompt_of[j]; spans[k]: what is trained, None: all of it; weights: of the texts where
    something weighs other than 1."""

    texts: list[str] = field(default_factory=list)
    origin: list[int] = field(default_factory=list)
    plain: list[bool] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    prompt_of: list[int] = field(default_factory=list)
    spans: list[tuple[Span, ...] | None] = field(default_factory=list)
    weights: dict[int, list[Weight]] = field(default_factory=dict)
    mark: str | None = None
    """Stands in the special tokens that the texts to be added spell, where those are plain text."""
    marked: dict[int, Marked] = field(default_factory=dict)
    """Texts in which such a mark stands, by their numbers; in `texts` they are without."""
    marked_prompts: dict[int, Marked] = field(default_factory=dict)
    framed: tuple[Framed, ...] = ()
    """Conversations beside these texts, trained as a whole, whose texts are not made."""

    def add(
        self,
        origin: int,
        text: str,
        *,
        plain: bool,
        spans: tuple[Span, ...] | None,
        prompt: str | None,
    ) -> None:
        """Add a text."""
        if self.mark is not None:
            text, spans, prompt = self._without_mark(text, spans, prompt, self.mark)
        if prompt is not None:
            self.prompts.append(prompt)
            self.prompt_of.append(len(self.texts))
        self.texts.append(text)
        self.origin.append(origin)
        self.plain.append(plain)
        self.spans.append(spans)

    @property
    def have_parts(self) -> bool:
        """Whether of some text not all is trained alike."""
        return bool(self.weights) or any(spans is not None for spans in self.spans)

    @property
    def lines(self) -> list[int]:
        """Lines of all these examples, in no order."""
        return [*self.origin, *(line for framed in self.framed for line in framed.origin)]

    def rendered(self) -> Texts:
        """All as texts."""
        made = self
        for framed in self.framed:
            count = len(framed)
            own = Texts([*framed], framed.origin, plain=[False] * count, spans=[None] * count)
            made = dataclasses.replace(made, framed=()).with_others(own)
        return made

    def with_others(self, others: Texts) -> Texts:
        """These texts and those of other lines, in the order of the lines. Neither has marked
        texts; each line has one text."""
        framed = self.framed + others.framed
        if not others.texts or not self.texts:
            return dataclasses.replace(self if self.texts else others, framed=framed)
        first = len(self.texts)
        origin = self.origin + others.origin
        order = sorted(range(len(origin)), key=origin.__getitem__)
        place = {number: new for new, number in enumerate(order)}
        prompts = [*zip((place[k] for k in self.prompt_of), self.prompts, strict=True)]
        prompts += zip((place[first + k] for k in others.prompt_of), others.prompts, strict=True)
        prompts.sort(key=lambda pair: pair[0])
        texts, plain, spans = (
            self.texts + others.texts,
            self.plain + others.plain,
            self.spans + others.spans,
        )
        return Texts(
            texts=[texts[k] for k in order],
            origin=[origin[k] for k in order],
            plain=[plain[k] for k in order],
            prompts=[prompt for _, prompt in prompts],
            prompt_of=[of for of, _ in prompts],
            spans=[spans[k] for k in order],
            weights={
                place[first * own + k]: w
                for own, each in ((0, self), (1, others))
                for k, w in each.weights.items()
            },
            framed=framed,
        )

    def _without_mark(
        self, text: str, spans: tuple[Span, ...] | None, prompt: str | None, mark: str
    ) -> tuple[str, tuple[Span, ...] | None, str | None]:
        number = len(self.texts)
        if prompt is not None and mark in prompt:
            prompt = self.marked_prompts.setdefault(len(self.prompts), Marked(prompt, mark)).clean
        if mark not in text:
            return text, spans, prompt
        marked = self.marked[number] = Marked(text, mark)
        if spans is not None:
            spans = tuple((marked.place(first), marked.place(last)) for first, last in spans)
        if number in self.weights:
            self.weights[number] = [
                (marked.place(a), marked.place(b), weight) for a, b, weight in self.weights[number]
            ]
        return marked.clean, spans, prompt


class Renderer:
    """A recipe's template and rules, ready to run."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._closing = closing(recipe.tokenizer)
        self._shows_calls = (
            recipe.chat_template is not None and "tool_calls" in recipe.chat_template
        )
        self._spanned = recipe.train_on in ("assistant", "last-assistant")

    def render(
        self,
        examples: Sequence[Example],
        rejected: list[Rejected],
        counts: Counter[str],
        *,
        watch: bool = False,
    ) -> Texts:
        """The texts of all examples; those that the template refuses, or whose masks are not
        proven, are set aside.

        watch: whether any of them may spell special tokens, which are counted, or marked to become
        plain text.
        """
        out = Texts()
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
                shown = excerpt(str(example.messages)[:2000])
                rejected.append(Rejected(example.origin, 0, reason, problem.message, shown))
        return out

    def ways(self) -> Counter[str]:
        """Conversations rendered so far, by the way they took."""
        used = (self.__dict__.get("_template"), self.__dict__.get("_turning"))
        return sum(
            (Counter(template.renders) for template in used if template is not None), Counter()
        )

    def whole_template(self) -> ChatTemplate | None:
        """The template, where conversations are rendered as they are and no single message of them
        counts.

        Raises TemplateError where it does not compile.
        """
        return None if self._by_turn else self._template

    def check_masks(self) -> None:
        """Raises Unproven where assistant turns are to be trained and the template does not tell
        them."""
        if self._by_turn and self._template is not None:
            _ = self._rule

    @cached_property
    def _template(self) -> ChatTemplate | None:
        # Records that are plain text have no use for it.
        return self._recipe.template()

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
    def spelled(self) -> Spelled:
        """The special tokens of the tokenizer, as texts may spell them."""
        return Spelled(self._recipe.tokenizer)

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
        template = self._recipe.template(turns=True)
        assert template is not None
        return template

    @cached_property
    def _rule(self) -> TurnRule:
        # With a template of its own, so that the probes do not count among the renders of the
        # records.
        template = self._recipe.template(turns=True)
        assert template is not None
        return derive_rule(template)

    def _chat(
        self, example: Example, messages: list[Message], out: Texts, counts: Counter[str]
    ) -> None:
        if self._template is None:
            raise TemplateError("there is no chat template")
        if self._recipe.expand_turns:
            self._expanded(example, messages, out, counts)
        elif self._by_turn or example.weights is not None:
            self._weighed(example, messages, out)
        else:
            whole = self._rendered(self._template, messages, example)
            # Rendered before anything is stored, so that a template that refuses the prompt leaves
            # nothing half done.
            prompt = self._prompt(example)
            out.add(
                example.origin,
                whole.text,
                plain=False,
                spans=whole.spans if self._spanned else None,
                prompt=prompt,
            )
        if not self._shows_calls and any(
            message.get("tool_calls") is not None for message in messages
        ):
            counts["warnings.tool_calls_not_shown"] += 1
        if example.tools and not self._shows_tools:
            counts["warnings.tools_not_shown"] += 1
        if example.prompt_messages is not None and _says_nothing(messages[-1]):
            counts["warnings.empty_target"] += 1

    def _prompt(self, example: Example) -> str | None:
        if example.prompt_messages is None or self._recipe.train_on == "all":
            return None
        assert self._template is not None
        return self._rendered(self._template, example.prompt_messages, example, prompt=True).text

    def _rendered(
        self,
        template: ChatTemplate,
        messages: list[Message],
        example: Example,
        *,
        prompt: bool = False,
    ) -> Rendered:
        try:
            return template.render(
                messages,
                tools=example.tools,
                add_generation_prompt=prompt,
                template_kwargs=example.template_kwargs,
                bare=example.bare,
            )
        except TemplateError:
            for other in other_ways(messages):
                try:
                    return template.render(
                        other,
                        tools=example.tools,
                        add_generation_prompt=prompt,
                        template_kwargs=example.template_kwargs,
                    )
                except TemplateError:
                    # What it says of the record as it is tells the user more.
                    continue
            raise

    def _weighed(self, example: Example, messages: list[Message], out: Texts) -> None:
        """A conversation of which single messages are trained."""
        whole = self._rendered(self._turning, messages, example)
        spans, weights = self._trained(whole, messages, example.weights)
        prompt = self._prompt(example)
        if weights:
            out.weights[len(out.texts)] = weights
        out.add(example.origin, whole.text, plain=False, spans=spans, prompt=prompt)

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
        weights = [float(mode == "all" or is_assistant(message)) for message in messages]
        if mode == "last-assistant":
            last = max((number for number, weight in enumerate(weights) if weight), default=-1)
            weights = [float(number == last) for number in range(len(messages))]
        for number, weight in enumerate(own or ()):
            if weight is not None and (mode != "last-assistant" or weights[number]):
                weights[number] = weight
        return weights

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
        self, example: Example, messages: list[Message], out: Texts, counts: Counter[str]
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

    def _plain(self, example: Example, out: Texts, counts: Counter[str]) -> None:
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
        self, example: Example, texts: list[str], out: Texts, counts: Counter[str]
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


def _says_nothing(message: Message) -> bool:
    content = message.get("content")
    return not (content.strip() if isinstance(content, str) else content) and not message.get(
        "tool_calls"
    )
