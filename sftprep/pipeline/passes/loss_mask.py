"""Loss masks: the trained tokens of an encoded batch, with their loss weights.

Two paths lead to a mask.

- The reference path looks up the characters of every token (`masking.mask_spans`), as transformers
  does.
- The fast path finds the boundaries of the trained regions in the token ids, between special tokens
  (anchors) that the template writes (`render/token_space`): one scan over the ids of a partition.

A text that fails a check of the fast path takes the reference path. If a sampled text has another
mask by the reference path, the whole batch takes that path.

The property tests in tests/render/test_token_space.py verify the fast path against the reference
path.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from sftprep.core.mask_arrays import completion_starts, mask_from, mask_spans, weigh_spans
from sftprep.core.ragged import replace_segments, to_offsets
from sftprep.core.types import Counts
from sftprep.render.rendered_batch import RenderedBatch
from sftprep.render.renderer import Renderer
from sftprep.render.token_space.anchors import continuation_ids
from sftprep.render.token_space.placing import AnchorTable, find_ids, place_regions
from sftprep.render.token_space.regions import AT, BEFORE, Literals
from sftprep.tokenize.encoders.base import Encoder, Tokens
from sftprep.tokenize.encoders.special_tokens import EscapedEncoder, EscapedText, replace_texts
from sftprep.tokenize.encoders.unicode_safe import may_combine
from sftprep.tokenize.loading.spec import TokenizerSpec

_Value = TypeVar("_Value", np.bool_, np.float32)
_log = logging.getLogger(__name__)


class MaskedTokens(NamedTuple):
    """The tokens of a batch with their mask and weights."""

    tokens: Tokens  # with the tokenizer's prefix and suffix around plain texts
    mask: NDArray[np.bool_]  # [tokens], True = trained
    weights: NDArray[np.float32] | None  # [tokens]; None if every trained token has the weight 1


class LossMask:
    """The masks for the batches of one renderer.

    Args:
        spec: The tokenizer.
        renderer: The renderer of the batches.
    """

    def __init__(self, spec: TokenizerSpec, renderer: Renderer) -> None:
        self._spec, self._renderer = spec, renderer

    def mask(
        self,
        batch: RenderedBatch,
        tokens: Tokens,
        encoder: Encoder,
        counts: Counts,
        samples: Sequence[int] = (),
    ) -> MaskedTokens:
        """Return the tokens of a batch with their mask.

        Args:
            batch: The rendered texts.
            tokens: Their tokens.
            encoder: The encoder that made the tokens.
            counts: Receives the number of masks by each path, with the reasons.
            samples: The numbers of texts whose masks by the fast path are compared with those by
                the reference path.
        """
        if not batch.anchored.numbers:
            return self._mask_by_characters(batch, tokens, encoder, counts)
        mask = np.zeros(len(tokens.input_ids), np.bool_)
        by_ids = self._mask_by_ids(batch, tokens, encoder, mask, counts)
        compared = [number for number in samples if by_ids[number]]
        if compared and not self._equals_reference(batch, tokens, encoder, mask, compared):
            _log.warning("masks by token ids are not used for a part of the records: one differed")
            counts["warnings.mask_failed_over"] = 1
            num_masks = counts.pop("masks.by_ids")
            counts["masks.by_characters"] += num_masks
            counts["masks.because.a sampled mask differed from that of the reference"] += num_masks
            by_ids[:] = False
        if by_ids.all():
            return MaskedTokens(tokens, mask, None)
        others = np.flatnonzero(~by_ids).tolist()
        part = batch.select(others, self._renderer.reference_spans)
        by_characters = self._mask_by_characters(part, tokens.take(others), encoder, counts)
        return _replace_texts(MaskedTokens(tokens, mask, None), others, by_characters)

    # --- the fast path ----------------------------------------------------------------------------

    def _mask_by_ids(
        self,
        batch: RenderedBatch,
        tokens: Tokens,
        encoder: Encoder,
        mask: NDArray[np.bool_],
        counts: Counts,
    ) -> NDArray[np.bool_]:
        """Set the mask of the anchored texts.

        Args:
            batch: The rendered texts.
            tokens: Their tokens.
            encoder: The encoder that made the tokens.
            mask: bool [tokens], all False; receives the mask.
            counts: Receives the number of masks by each path, with the reasons.

        Returns:
            bool [texts]; the texts whose mask is correct.
        """
        anchored = batch.anchored
        assert batch.literals is not None
        # 1. Place the regions. A region that ends before an anchor needs to know which tokens hold
        # no first byte of a character, unless all characters have one byte.
        has_wide_characters = BEFORE in anchored.regions[1::2] and not all(
            batch.texts[number].isascii() for number in anchored.numbers
        )
        numbers = np.array(anchored.numbers, np.int64)
        table = AnchorTable(
            self._anchor_ids,
            self._literal_ids(batch.literals, encoder),
            self._continues if has_wide_characters else None,
        )
        failed, cut = place_regions(tokens, anchored, table, mask)
        # 2. Examine the texts that a normalizer changed.
        altered = np.zeros(len(numbers), np.bool_)
        for index in np.flatnonzero(np.isin(numbers, tokens.altered_texts)).tolist():
            altered[index] = self._may_move_boundary(batch, index)
        by_ids = np.zeros(len(batch.texts), np.bool_)
        by_ids[numbers] = ~(failed | altered)
        # 3. Count both paths, with the reasons for the reference path.
        counts["masks.by_ids"] += int(np.count_nonzero(by_ids))
        cut &= by_ids[numbers]
        if cut.any():
            cut_texts = numbers[cut]
            counts.warn("prompt_not_prefix", batch.line_of[int(cut_texts[0])], len(cut_texts))
        for reason, texts in (
            ("a normalizer changes the text", altered),
            ("a text spells a special token or merges with one", failed & ~altered),
        ):
            count = int(np.count_nonzero(texts))
            if count:
                counts["masks.by_characters"] += count
                counts[f"masks.because.{reason}"] += count
        return by_ids

    def _may_move_boundary(self, batch: RenderedBatch, index: int) -> bool:
        """Return whether the normalizer may have moved a boundary of a region.

        A literal with the expected ids was not changed. But a boundary may have moved if the
        character after a literal, or the last character before an anchor, may combine with others.

        Args:
            batch: The rendered texts.
            index: The index of the text among the anchored ones.
        """
        text, literals = batch.texts[batch.anchored.numbers[index]], batch.literals
        used_literals = batch.anchored.literals_of(index)
        anchors = self._renderer.anchors
        assert literals is not None
        assert not isinstance(anchors, str)
        if BEFORE in used_literals and any(
            may_combine(part[-1]) for part in anchors.split(text) if part
        ):
            return True
        for literal in used_literals - {AT, BEFORE}:
            _, *following = text.split(literals.texts[literal])
            if any(may_combine(part[0]) for part in following if part):
                return True
        return False

    def _equals_reference(
        self,
        batch: RenderedBatch,
        tokens: Tokens,
        encoder: Encoder,
        mask: NDArray[np.bool_],
        numbers: list[int],
    ) -> bool:
        """Return whether these texts have the same masks by the reference path."""
        part = batch.select(numbers, self._renderer.reference_spans)
        reference = self._mask_by_characters(part, tokens.take(numbers), encoder, Counts())
        masks = [mask[tokens.offsets[k] : tokens.offsets[k + 1]] for k in numbers]
        return np.array_equal(np.concatenate(masks), reference.mask)

    @cached_property
    def _anchor_ids(self) -> NDArray[np.int32]:
        anchors = self._renderer.anchors
        assert not isinstance(anchors, str)
        return np.array([*anchors.ids.values()], np.int32)

    @cached_property
    def _continues(self) -> NDArray[np.bool_]:
        """The tokens without the first byte of any character: bool [vocabulary]."""
        table = np.zeros(self._spec.vocab_size, np.bool_)
        table[[*continuation_ids(self._spec)]] = True
        return table

    def _literal_ids(
        self, literals: Literals, encoder: Encoder
    ) -> Sequence[Sequence[NDArray[np.int32]]]:
        """Return the ids of literals with anchors, in the form of `AnchorTable.literals`."""
        found: list[list[NDArray[np.int32]]] = []
        id_of_x = int(encoder.encode(["x"]).input_ids[-1])
        alone = encoder.encode(literals.texts)
        followed = encoder.encode([text + "x" for text in literals.texts])
        for number in range(len(literals.texts)):
            variants = [alone.ids_of_text(number)]
            ids = followed.ids_of_text(number)
            # If the last id is that of the "x", the others cover the literal.
            if ids[-1] == id_of_x and not np.array_equal(ids[:-1], variants[0]):
                variants.append(ids[:-1])
            found.append([ids for ids in variants if self._begins_with_anchor(ids)])
        return found

    def _begins_with_anchor(self, ids: NDArray[np.int32]) -> bool:
        """Return whether the first id, and no other one, is that of an anchor."""
        return bool(find_ids(ids, self._anchor_ids).tolist() == [0])

    # --- the reference path -----------------------------------------------------------------------

    def _mask_by_characters(
        self, batch: RenderedBatch, tokens: Tokens, encoder: Encoder, counts: Counts
    ) -> MaskedTokens:
        """Mask a batch by the characters of its tokens."""
        spec = self._spec
        plain = np.array(batch.plain, dtype=np.bool_)
        # 1. Without spans every token is trained, and no character is looked up.
        chars = encoder.token_chars(batch.texts, tokens) if batch.has_parts else None
        if batch.marked:
            tokens, chars = self._escape(tokens, chars, batch.marked)
        mask, weights = _mask_by_spans(batch, chars, tokens)
        # 2. Add the tokenizer's prefix and suffix to plain texts.
        if plain.any() and (spec.prefix_ids or spec.suffix_ids):
            tokens, position_of = _surround(tokens, plain, spec.prefix_ids, spec.suffix_ids)
            mask = _move_values(mask, len(tokens.input_ids), position_of)
            if weights is not None:
                weights = _move_values(weights, len(tokens.input_ids), position_of)
        # 3. Remove the tokens of prompts.
        if batch.prompts:
            mask &= self._completion_mask(batch, tokens, encoder, plain, counts)
        if weights is not None:
            weights *= mask
        return MaskedTokens(tokens, mask, weights)

    @cached_property
    def _escaped_encoder(self) -> EscapedEncoder:
        return EscapedEncoder(self._spec)

    def _escape(
        self, tokens: Tokens, chars: NDArray[np.int64] | None, escaped_texts: dict[int, EscapedText]
    ) -> tuple[Tokens, NDArray[np.int64] | None]:
        """Encode the special tokens spelled by texts as plain text."""
        return replace_texts(
            tokens,
            chars,
            {number: self._escaped_encoder.encode(text) for number, text in escaped_texts.items()},
        )

    def _completion_mask(
        self,
        batch: RenderedBatch,
        tokens: Tokens,
        encoder: Encoder,
        plain: NDArray[np.bool_],
        counts: Counts,
    ) -> NDArray[np.bool_]:
        """Return the tokens after the prompt of each text: bool [tokens].

        A completion starts where the ids of the whole text differ from those of the prompt alone,
        as in TRL.
        """
        prompts, text_of = encoder.encode(batch.prompts), np.array(batch.prompt_of)
        if batch.marked_prompts:
            prompts, _ = self._escape(prompts, None, batch.marked_prompts)
        if self._spec.prefix_ids and plain.any():
            prompts, _ = _surround(prompts, plain[text_of], self._spec.prefix_ids, ())
        # A text without a prompt has an empty one: its completion starts at its first token.
        lengths = np.zeros(len(batch.texts), dtype=np.int64)
        lengths[text_of] = np.diff(prompts.offsets)
        starts = completion_starts(
            prompts.input_ids, to_offsets(lengths), tokens.input_ids, tokens.offsets
        )
        merged = np.flatnonzero(starts < lengths)
        if len(merged):
            counts.warn("prompt_not_prefix", batch.line_of[int(merged[0])], len(merged))
        return mask_from(starts, tokens.offsets)


def _mask_by_spans(
    batch: RenderedBatch, chars: NDArray[np.int64] | None, tokens: Tokens
) -> tuple[NDArray[np.bool_], NDArray[np.float32] | None]:
    """Return the tokens in the spans of texts, and their weights if some are not 1.

    Args:
        batch: The rendered texts.
        chars: int64 [tokens, 2]; the characters of each token. None: every token is trained.
        tokens: The tokens of the texts.
    """
    if chars is None:
        return np.ones(len(tokens.input_ids), dtype=np.bool_), None
    mask = mask_spans(batch.spans, chars, tokens.offsets)
    return mask, weigh_spans(batch.weights, chars, tokens.offsets, mask) if batch.weights else None


def _surround(
    tokens: Tokens,
    is_selected: NDArray[np.bool_],
    prefix: tuple[int, ...],
    suffix: tuple[int, ...],
) -> tuple[Tokens, NDArray[np.int64]]:
    """Add a prefix and a suffix to the selected texts.

    Args:
        tokens: The tokens of the texts.
        is_selected: bool [texts].
        prefix: The ids to add at the start.
        suffix: The ids to add at the end.

    Returns:
        The new tokens; and int64 [tokens], the new position of each old token.

    Example:
        texts = [[5, 6], [7]], is_selected = [True, False], prefix = (1,), suffix = (2,)
        ->  [[1, 5, 6, 2], [7]], [1, 2, 4]
    """
    lengths = np.diff(tokens.offsets)
    offsets = to_offsets(lengths + is_selected * (len(prefix) + len(suffix)))
    ids = np.empty(int(offsets[-1]), dtype=np.int32)
    # Copy the old ids.
    shift = offsets[:-1] + is_selected * len(prefix) - tokens.offsets[:-1]
    position_of = np.arange(len(tokens.input_ids)) + np.repeat(shift, lengths)
    ids[position_of] = tokens.input_ids
    # Write the new ones into the gaps.
    for index, token in enumerate(prefix):
        ids[offsets[:-1][is_selected] + index] = token
    for index, token in enumerate(suffix):
        ids[offsets[1:][is_selected] - len(suffix) + index] = token
    return Tokens(ids, offsets), position_of


def _move_values(
    values: NDArray[_Value], length: int, position_of: NDArray[np.int64]
) -> NDArray[_Value]:
    """Return `values` at new positions in an array of this length.

    The other elements are 1: the tokens of a prefix or suffix are trained, with the weight 1.
    """
    moved = np.ones(length, dtype=values.dtype)
    moved[position_of] = values
    return moved


def _replace_texts(batch: MaskedTokens, numbers: Sequence[int], new: MaskedTokens) -> MaskedTokens:
    """Replace the texts with these numbers in a batch, in order."""
    offsets, new_offsets = batch.tokens.offsets, new.tokens.offsets

    def replace(values: NDArray[_Value], new_values: NDArray[_Value]) -> NDArray[_Value]:
        segments = {
            number: new_values[new_offsets[index] : new_offsets[index + 1]]
            for index, number in enumerate(numbers)
        }
        return replace_segments(values, offsets, segments)

    mask, weights = replace(batch.mask, new.mask), None
    if new.weights is not None:
        weights = replace(np.ones(len(batch.mask), np.float32), new.weights) * mask
    return MaskedTokens(batch.tokens.replace(numbers, new.tokens), mask, weights)
