"""Rendered examples with their trained parts, before they are encoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sftprep.core.types import Example
from sftprep.render.token_space.placing import AnchoredTexts
from sftprep.render.token_space.regions import Literals
from sftprep.tokenize.encoders.special_tokens import EscapedText
from sftprep.tokenize.loading.spec import TokenizerSpec

Span = tuple[int, int]
"""Characters [first, last) of a text."""
Weight = tuple[int, int, float]
"""Characters [first, last) of a text, and the loss weight of their tokens; 0: not trained."""


@dataclass(slots=True)
class RenderedBatch:
    """Rendered examples, in order.

    There are two descriptions of what is trained. `spans` has the character ranges for the
    reference path. `anchored` has boundaries in token space for the fast path; the spans of such a
    text are empty, and are computed from its conversation only if a check of the fast path fails.

    Example:
        One conversation, of which "Yes<|im_end|>" is trained, on the reference path:
        texts = ["<user>Hi<assistant>Yes<|im_end|>"], line_of = [0], plain = [False],
        spans = [((19, 32),)]
    """

    texts: list[str] = field(default_factory=list)
    line_of: list[int] = field(default_factory=list)  # for each text, the line of its record
    # For each text, whether it gets the tokenizer's own prefix and suffix: plain texts do, rendered
    # conversations do not.
    plain: list[bool] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    prompt_of: list[int] = field(default_factory=list)  # for each prompt, the index of its text
    # For each text, the spans that are trained; None: the whole text.
    spans: list[tuple[Span, ...] | None] = field(default_factory=list)
    # By the index of the text, for texts that contain a loss weight other than 1.
    weights: dict[int, list[Weight]] = field(default_factory=dict)
    anchored: AnchoredTexts = field(default_factory=AnchoredTexts)
    # The lines of the records with omissions, of which the texts lack a part.
    omission_lines: list[int] = field(default_factory=list)
    # The examples of the anchored texts, from which their spans can still be computed.
    conversations: list[Example] = field(default_factory=list)
    literals: Literals | None = None  # the literals that the boundaries in `anchored` refer to
    # The character that marks special tokens in the next text, if they are to become plain text.
    mark: str | None = None
    # By the index of the text or prompt, those that contain marks; `texts` and `prompts` have them
    # without the marks.
    marked: dict[int, EscapedText] = field(default_factory=dict)
    marked_prompts: dict[int, EscapedText] = field(default_factory=dict)

    def add(
        self,
        line: int,
        text: str,
        *,
        plain: bool,
        spans: tuple[Span, ...] | None,
        prompt: str | None,
    ) -> None:
        """Add a text.

        Args:
            line: The line of its record.
            text: The text.
            plain: Whether it gets the tokenizer's own prefix and suffix.
            spans: The characters that are trained; None: all of them.
            prompt: The text of its prompt alone, which is not trained; None: there is none.
        """
        if self.mark is not None:
            text, spans, prompt = self._remove_mark(text, spans, prompt, self.mark)
        if prompt is not None:
            self.prompts.append(prompt)
            self.prompt_of.append(len(self.texts))
        self.texts.append(text)
        self.line_of.append(line)
        self.plain.append(plain)
        self.spans.append(spans)

    @property
    def has_parts(self) -> bool:
        """Whether some text is not trained uniformly, apart from its prompt."""
        return bool(self.weights) or any(spans is not None for spans in self.spans)

    def select(
        self,
        numbers: Sequence[int],
        find_spans: Callable[[Example], tuple[tuple[Span, ...] | None, str | None]],
    ) -> RenderedBatch:
        """Return some of the texts, for the reference path.

        Args:
            numbers: The indices of the texts.
            find_spans: Returns the spans of a conversation, and the text of its prompt alone (None
                if it has no prompt).
        """
        selected = RenderedBatch()
        by_number = dict(zip(self.anchored.numbers, self.conversations, strict=True))
        prompt_index = {text: prompt for prompt, text in enumerate(self.prompt_of)}
        for new, number in enumerate(numbers):
            conversation = by_number.get(number)
            spans, prompt = self.spans[number], None
            if conversation is not None:
                spans, prompt = find_spans(conversation)
            elif number in prompt_index:
                index = prompt_index[number]
                prompt = self.prompts[index]
                if index in self.marked_prompts:
                    selected.marked_prompts[len(selected.prompts)] = self.marked_prompts[index]
            if number in self.weights:
                selected.weights[new] = self.weights[number]
            if number in self.marked:
                selected.marked[new] = self.marked[number]
            selected.add(
                self.line_of[number],
                self.texts[number],
                plain=self.plain[number],
                spans=spans,
                prompt=prompt,
            )
        return selected

    def _remove_mark(
        self, text: str, spans: tuple[Span, ...] | None, prompt: str | None, mark: str
    ) -> tuple[str, tuple[Span, ...] | None, str | None]:
        """Store the next text with marks; return it, its spans and its prompt without."""
        number = len(self.texts)
        if prompt is not None and mark in prompt:
            prompt = self.marked_prompts.setdefault(
                len(self.prompts), EscapedText(prompt, mark)
            ).clean
        if mark not in text:
            return text, spans, prompt
        marked = self.marked[number] = EscapedText(text, mark)
        # Spans and weights refer to the marked text.
        if spans is not None:
            spans = tuple(
                (marked.clean_offset(first), marked.clean_offset(last)) for first, last in spans
            )
        if number in self.weights:
            self.weights[number] = [
                (marked.clean_offset(first), marked.clean_offset(last), weight)
                for first, last, weight in self.weights[number]
            ]
        return marked.clean, spans, prompt


def text_ending(spec: TokenizerSpec) -> str:
    """Return the end token for a plain text without one.

    The end token is written as text, as TRL does, so that the encoder needs only one pass. It is
    empty for a tokenizer that adds its own end token to every text.
    """
    return "" if spec.eos_token is None or spec.eos_token_id in spec.suffix_ids else spec.eos_token
