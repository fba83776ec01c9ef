"""The text and the role of each token of a sequence, for display."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftprep.chat_template.assistant_spans import is_assistant
from sftprep.core.types import Example
from sftprep.recipe import Recipe
from sftprep.render.rendered_batch import RenderedBatch
from sftprep.render.turn_roles import RoleFinder, RoleSpan
from sftprep.tokenize.encoders.base import Encoder, EncoderFault, Tokens
from sftprep.tokenize.encoders.special_tokens import EscapedEncoder

_REPLACEMENT = "\ufffd"


class TokenTexts:
    """The texts and the roles of the tokens of one recipe.

    It observes pass 1 (`Preprocessor`), and describes the rows of the last batch.

    Args:
        recipe: The recipe.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._spec = recipe.tokenizer
        self._roles = RoleFinder(recipe)
        self._unknown_id = recipe.tokenizer.unknown_token_id()
        self.forget()

    def forget(self) -> None:
        """Forget the last batch, because pre-tokenized rows are not observed."""
        self._examples: dict[int, Example] = {}  # by the line
        self._texts: RenderedBatch | None = None
        self._encoder: Encoder | None = None  # the encoder of the texts

    def observe(self, examples: Sequence[Example], texts: RenderedBatch, encoder: Encoder) -> None:
        """Keep the examples, the texts and the encoder of a batch; an `Observer`."""
        self._examples = {example.line: example for example in examples}
        self._texts, self._encoder = texts, encoder

    def has_answer(self, row: int) -> bool:
        """Return whether a sequence of the last batch has an answer that could be trained.

        Args:
            row: The index of the sequence.
        """
        if self._texts is None:
            return True
        messages = self._examples[self._texts.line_of[row]].messages
        return messages is None or any(map(is_assistant, messages))

    def describe(self, row: int, ids: NDArray[np.int32]) -> tuple[list[str], list[str]]:
        """Return the text and the role of each token of a sequence of the last batch.

        Args:
            row: The index of the sequence.
            ids: int32 [n], its tokens before the cut.

        Returns:
            The n texts, "" for a token that completes the character of the token before it; and
            the n roles, "" where they are not known.
        """
        batch = self._texts
        if batch is None:
            return self._decode_each(ids.tolist()), [""] * len(ids)
        spec, text = self._spec, batch.texts[row]
        num_prefix = len(spec.prefix_ids) if batch.plain[row] else 0
        num_suffix = len(spec.suffix_ids) if batch.plain[row] else 0
        body = ids[num_prefix : len(ids) - num_suffix]
        chars = self._find_chars(row, body)
        pieces, roles = [], []
        spans = self._find_roles(row)
        firsts = [span.first for span in spans]
        shown = 0  # characters of the text that earlier pieces show
        for token, (first, last) in zip(body.tolist(), chars, strict=True):
            piece = text[shown : max(shown, last)]
            if token == self._unknown_id and self._decode([token]) not in piece:
                piece = self._decode([token])  # the characters are lost
            pieces.append(piece)
            number = bisect_right(firsts, first) - 1
            roles.append(spans[number].role if number >= 0 else "")
            shown = max(shown, last)
        if pieces:
            pieces[-1] += text[shown:]
        start, end = ids[:num_prefix].tolist(), ids[len(ids) - num_suffix :].tolist()
        return (
            [*map(self._decode_one, start), *pieces, *map(self._decode_one, end)],
            ["" for _ in start] + roles + ["" for _ in end],
        )

    def _find_chars(self, row: int, ids: NDArray[np.int32]) -> Sequence[tuple[int, int]]:
        """Return the characters [first, last) of each token of a text."""
        batch, encoder = self._texts, self._encoder
        assert batch is not None
        assert encoder is not None
        if row in batch.marked:
            return self._escaped.encode(batch.marked[row])[1]
        tokens = Tokens(np.ascontiguousarray(ids), np.array([0, len(ids)], np.int64))
        try:
            chars = encoder.token_chars([batch.texts[row]], tokens)
        except EncoderFault:
            chars = self._reference.token_chars([batch.texts[row]], tokens)
        return [(int(first), int(last)) for first, last in chars.tolist()]

    def _find_roles(self, row: int) -> list[RoleSpan]:
        batch = self._texts
        assert batch is not None
        example = self._examples[batch.line_of[row]]
        marked = batch.marked.get(row)
        if marked is None:
            return self._roles.find(example, batch.texts[row])
        # The strings of the example have the marks too.
        return [
            RoleSpan(marked.clean_offset(first), marked.clean_offset(last), role)
            for first, last, role in self._roles.find(example, marked.text)
        ]

    @cached_property
    def _escaped(self) -> EscapedEncoder:
        return EscapedEncoder(self._spec)

    @cached_property
    def _reference(self) -> Encoder:
        from sftprep.tokenize.encoders.reference import HfEncoder

        return HfEncoder(self._spec, threads=False)

    @cached_property
    def _backend(self) -> Any:
        from tokenizers import Tokenizer

        return Tokenizer.from_buffer(self._spec.json)

    def _decode(self, ids: list[int]) -> str:
        return str(self._backend.decode(ids, skip_special_tokens=False))

    def _decode_one(self, token: int) -> str:
        return self._decode([token])

    def _decode_each(self, ids: list[int]) -> list[str]:
        """Return the text of each token, without the text that it is made of.

        A token is decoded after the one before it, because some tokenizers drop the space before
        the first token. Tokens that are parts of a character are decoded together.
        """
        pieces = [""] * len(ids)
        first = 0  # of the tokens that are decoded together
        for index in range(len(ids)):
            before = ids[first - 1 : first] if first else []
            context, text = self._decode(before), self._decode(before + ids[first : index + 1])
            # At most four bytes make a character.
            is_complete = not text.endswith(_REPLACEMENT) or index - first == 3
            if is_complete or index == len(ids) - 1:
                is_after = text.startswith(context)
                alone = self._decode(ids[first : index + 1])
                pieces[first] = text[len(context) :] if is_after else alone
                first = index + 1
        return pieces
