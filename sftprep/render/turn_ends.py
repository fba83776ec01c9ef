"""Tokens that end turns, and their exclusion from training.

A turn ends with a special token or the end-of-sequence token, and perhaps whitespace. A template
that ends its turns otherwise has no such token, and nothing is excluded.
"""

from __future__ import annotations

from collections.abc import Sequence

from sftprep.chat_template.assistant_spans import TurnSpan
from sftprep.config.validation import TrainEnd
from sftprep.render.rendered_batch import Weight
from sftprep.tokenize.loading.spec import TokenizerSpec


class TurnEnds:
    """The exclusion of the tokens that end turns.

    Args:
        tokenizer: The tokenizer.
        trained: Which of them are trained: that of each trained turn (turn), only that of the last
            trained one (last), or none.
    """

    def __init__(self, tokenizer: TokenizerSpec, trained: TrainEnd) -> None:
        entries = tokenizer.part("added_tokens") or []
        special = {entry["content"] for entry in entries if entry.get("special")}
        tokens = special | {tokenizer.eos_token or ""}
        # Longer tokens first, because one may be the end of another.
        self._tokens = sorted(filter(None, tokens), key=len, reverse=True)
        self._trained = trained
        self.are_trained = trained == "turn"  # whether nothing is excluded

    def find_excluded(self, spans: Sequence[TurnSpan], text: str) -> list[Weight]:
        """Return the characters of the ends that are not trained, with the weight 0.

        A shorter span would not do: a span covers only the first token of its last character.

        Args:
            spans: The trained spans, in the order of the text; a turn has one or more.
            text: The text.

        Example:
            "<user>Hi<end><bot>Yes<end>", the span of "Yes<end>", trained = "none"
            ->  the characters of the second "<end>"
        """
        if self.are_trained:
            return []
        last_spans = [
            span
            for number, span in enumerate(spans)
            if number + 1 == len(spans) or spans[number + 1].message != span.message
        ]
        if self._trained == "last":
            last_spans = last_spans[:-1]
        return [end for span in last_spans if (end := self._find_end(span, text)) is not None]

    def _find_end(self, span: TurnSpan, text: str) -> Weight | None:
        words = text[span.first : span.last].rstrip()
        for token in self._tokens:
            if words.endswith(token):
                return span.first + len(words) - len(token), span.last, 0.0
        return None
