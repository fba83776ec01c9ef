"""Rendered examples and what is known of their trained parts, before anything is encoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sftprep.core.types import Example
from sftprep.render.token_space.placing import AnchoredTexts
from sftprep.render.token_space.regions import Literals
from sftprep.tokenize.encoders.special_tokens import EscapedText

Span = tuple[int, int]
"""Characters [first, last) of a text."""
Weight = tuple[int, int, float]
"""Characters [first, last) of a text, and what their tokens weigh in the loss; 0: they are not
trained."""


@dataclass(slots=True)
class RenderedBatch:
    """Rendered examples.

    Text k is of record line origin[k]; plain texts get the tokenizer's own prefix and suffix,
    rendered conversations do not. Two descriptions of what is trained exist: spans[k], the
    character ranges for the reference path, None for the whole text; and `anchored`, boundaries in
    token space, for texts whose spans are not worked out (their spans[k] is empty) unless a check
    fails. prompts[j] is the prompt of text prompt_of[j]; weights: of the texts where something
    weighs other than 1.
    """

    texts: list[str] = field(default_factory=list)
    origin: list[int] = field(default_factory=list)
    plain: list[bool] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    prompt_of: list[int] = field(default_factory=list)
    spans: list[tuple[Span, ...] | None] = field(default_factory=list)
    weights: dict[int, list[Weight]] = field(default_factory=dict)
    anchored: AnchoredTexts = field(default_factory=AnchoredTexts)
    conversations: list[Example] = field(default_factory=list)
    """Those of the anchored texts, from which their spans can still be worked out."""
    literals: Literals | None = None
    """The literals that the boundaries in `anchored` refer to."""
    mark: str | None = None
    """Is written into the special tokens that the texts to be added spell, if those are to become
    plain text."""
    marked: dict[int, EscapedText] = field(default_factory=dict)
    """Texts that contain such a mark, by their numbers; `texts` has them without."""
    marked_prompts: dict[int, EscapedText] = field(default_factory=dict)

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

    def part(
        self,
        numbers: Sequence[int],
        in_spans: Callable[[Example], tuple[tuple[Span, ...] | None, str | None]],
    ) -> RenderedBatch:
        """Some of the texts, for the reference path. in_spans: works out the spans of a
        conversation, and the text of its prompt alone, None if it has none."""
        made = RenderedBatch()
        by_number = dict(zip(self.anchored.numbers, self.conversations, strict=True))
        place = {number: own for own, number in enumerate(self.prompt_of)}
        for new, number in enumerate(numbers):
            conversation = by_number.get(number)
            spans, prompt = self.spans[number], None
            if conversation is not None:
                spans, prompt = in_spans(conversation)
            elif number in place:
                prompt = self.prompts[place[number]]
                if place[number] in self.marked_prompts:
                    made.marked_prompts[len(made.prompts)] = self.marked_prompts[place[number]]
            if number in self.weights:
                made.weights[new] = self.weights[number]
            if number in self.marked:
                made.marked[new] = self.marked[number]
            made.add(
                self.origin[number],
                self.texts[number],
                plain=self.plain[number],
                spans=spans,
                prompt=prompt,
            )
        return made

    def _without_mark(
        self, text: str, spans: tuple[Span, ...] | None, prompt: str | None, mark: str
    ) -> tuple[str, tuple[Span, ...] | None, str | None]:
        number = len(self.texts)
        if prompt is not None and mark in prompt:
            prompt = self.marked_prompts.setdefault(
                len(self.prompts), EscapedText(prompt, mark)
            ).clean
        if mark not in text:
            return text, spans, prompt
        marked = self.marked[number] = EscapedText(text, mark)
        if spans is not None:
            spans = tuple(
                (marked.clean_offset(first), marked.clean_offset(last)) for first, last in spans
            )
        if number in self.weights:
            self.weights[number] = [
                (marked.clean_offset(a), marked.clean_offset(b), weight)
                for a, b, weight in self.weights[number]
            ]
        return marked.clean, spans, prompt
