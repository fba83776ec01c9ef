"""Which tokens of a rendered and encoded batch are trained, and what they weigh in the loss.

Two paths lead to a mask. The reference path looks up the characters of every token
(`masking.mask_spans`, as transformers does). The fast path finds the regions between anchors in the
ids (`render/token_space`); what fails one of its checks takes the reference path.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from sftprep.core.ragged import replace_segments, to_offsets
from sftprep.masking import completion_starts, mask_from, mask_spans, weigh_spans
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


class Masked(NamedTuple):
    """Tokens of a batch with the tokenizer's own prefix and suffix, a mask bool [tokens], and
    weights float32 [tokens], None if every trained token weighs 1."""

    tokens: Tokens
    mask: NDArray[np.bool_]
    weights: NDArray[np.float32] | None


class LossMask:
    """Works out the masks of the batches that one renderer renders."""

    def __init__(self, spec: TokenizerSpec, renderer: Renderer) -> None:
        self._spec, self._renderer = spec, renderer

    def mask(
        self,
        batch: RenderedBatch,
        tokens: Tokens,
        encoder: Encoder,
        counts: Counter[str],
        samples: Sequence[int] = (),
    ) -> Masked:
        """The mask of a batch. samples: texts whose mask by anchors is compared with the reference
        path; where one differs, the whole batch takes that path, and this is counted."""
        if not batch.anchored.numbers:
            return self._by_characters(batch, tokens, encoder, counts)
        mask = np.zeros(len(tokens.input_ids), np.bool_)
        by_ids = self._place(batch, tokens, encoder, mask, counts)
        compared = [number for number in samples if by_ids[number]]
        if compared and not self._confirmed(batch, tokens, encoder, mask, compared):
            _log.warning("masks by token ids are not used for a part of the records: one differed")
            counts["warnings.mask_failed_over"] = 1
            counts["masks.by_characters"] += counts.pop("masks.by_ids")
            by_ids[:] = False
        if by_ids.all():
            return Masked(tokens, mask, None)
        rows = np.flatnonzero(~by_ids).tolist()
        part = batch.select(rows, self._renderer.reference_spans)
        others = self._by_characters(part, tokens.take(rows), encoder, counts)
        return _merged(rows, Masked(tokens, mask, None), others)

    def _place(
        self,
        batch: RenderedBatch,
        tokens: Tokens,
        encoder: Encoder,
        mask: NDArray[np.bool_],
        counts: Counter[str],
    ) -> NDArray[np.bool_]:
        """Set the mask of the anchored texts; returns those for which it is right: bool [texts]."""
        own = batch.anchored
        assert batch.literals is not None
        needs_bytes = BEFORE in own.regions[1::2] and not all(
            batch.texts[number].isascii() for number in own.numbers
        )
        numbers = np.array(own.numbers, np.int64)
        table = AnchorTable(
            self._anchor_ids,
            self._literal_ids(batch.literals, encoder),
            self._continues if needs_bytes else None,
        )
        failed, cut = place_regions(tokens, own, table, mask)
        altered = np.zeros(len(numbers), np.bool_)
        for place in np.flatnonzero(np.isin(numbers, tokens.altered_texts)).tolist():
            altered[place] = self._may_move(batch, place)
        by_ids = np.zeros(len(batch.texts), np.bool_)
        by_ids[numbers] = ~(failed | altered)
        counts["masks.by_ids"] += int(np.count_nonzero(by_ids))
        cut &= by_ids[numbers]
        if cut.any():
            counts["warnings.prompt_not_prefix"] += int(np.count_nonzero(cut))
        merged = failed & ~altered
        for reason, rows in (
            ("a normalizer changes the text", altered),
            ("a text spells a special token or merges with one", merged),
        ):
            count = int(np.count_nonzero(rows))
            if count:
                counts["masks.by_characters"] += count
                counts[f"masks.because.{reason}"] += count
        return by_ids

    def _may_move(self, batch: RenderedBatch, place: int) -> bool:
        """Whether a normalizer that changed a text may have moved a boundary of a region.

        A literal whose ids are as expected was not changed; but the character after it may be
        another one than before, and so may the last character before an anchor.
        """
        own, text = batch.anchored, batch.texts[batch.anchored.numbers[place]]
        literals, known = own.literals_of(place), batch.literals
        anchors = self._renderer.anchors
        assert known is not None
        assert not isinstance(anchors, str)
        if BEFORE in literals and any(
            may_combine(part[-1]) for part in anchors.split(text) if part
        ):
            return True
        for literal in literals - {AT, BEFORE}:
            _, *following = text.split(known.texts[literal])
            if any(may_combine(part[0]) for part in following if part):
                return True
        return False

    def _confirmed(
        self,
        batch: RenderedBatch,
        tokens: Tokens,
        encoder: Encoder,
        mask: NDArray[np.bool_],
        numbers: list[int],
    ) -> bool:
        """Whether the reference path gives the same masks for these texts."""
        part = batch.select(numbers, self._renderer.reference_spans)
        theirs = self._by_characters(part, tokens.take(numbers), encoder, Counter())
        own = [mask[tokens.offsets[k] : tokens.offsets[k + 1]] for k in numbers]
        return np.array_equal(np.concatenate(own), theirs.mask)

    @cached_property
    def _anchor_ids(self) -> NDArray[np.int32]:
        anchors = self._renderer.anchors
        assert not isinstance(anchors, str)
        return np.array([*anchors.ids.values()], np.int32)

    @cached_property
    def _continues(self) -> NDArray[np.bool_]:
        table = np.zeros(self._spec.vocab_size, np.bool_)
        table[[*continuation_ids(self._spec)]] = True
        return table

    def _literal_ids(
        self, literals: Literals, encoder: Encoder
    ) -> Sequence[Sequence[NDArray[np.int32]]]:
        """The ids of each literal with its anchor, as for `AnchorTable`."""
        found: list[list[NDArray[np.int32]]] = []
        following = int(encoder.encode(["x"]).input_ids[-1])
        alone = encoder.encode(literals.texts)
        followed = encoder.encode([text + "x" for text in literals.texts])
        for number in range(len(literals.texts)):
            known = [alone.ids_of_text(number)]
            ids = followed.ids_of_text(number)
            # The rest of these ids covers the literal if the last one is that of the "x".
            if ids[-1] == following and not np.array_equal(ids[:-1], known[0]):
                known.append(ids[:-1])
            found.append([own for own in known if self._begins_with_anchor(own)])
        return found

    def _begins_with_anchor(self, ids: NDArray[np.int32]) -> bool:
        """Whether the first id, and no other one, is that of an anchor."""
        return bool(find_ids(ids, self._anchor_ids).tolist() == [0])

    # --- the reference path -----------------------------------------------------------------------

    def _by_characters(
        self, batch: RenderedBatch, tokens: Tokens, encoder: Encoder, counts: Counter[str]
    ) -> Masked:
        """The mask of a batch by the characters of its tokens."""
        spec = self._spec
        plain = np.array(batch.plain, dtype=np.bool_)
        chars = encoder.token_chars(batch.texts, tokens) if batch.has_parts else None
        if batch.marked:
            tokens, chars = self._escaped(tokens, chars, batch.marked)
        mask, weights = _parts(batch, chars, tokens)
        if plain.any() and (spec.prefix_ids or spec.suffix_ids):
            tokens, place_of = _surrounded(tokens, plain, spec.prefix_ids, spec.suffix_ids)
            total = len(tokens.input_ids)
            mask = _placed(mask, total, place_of)
            weights = weights if weights is None else _placed(weights, total, place_of)
        if batch.prompts:
            mask &= self._completion_mask(batch, tokens, encoder, plain, counts)
        if weights is not None:
            weights *= mask
        return Masked(tokens, mask, weights)

    @cached_property
    def _escaping(self) -> EscapedEncoder:
        return EscapedEncoder(self._spec)

    def _escaped(
        self, tokens: Tokens, chars: NDArray[np.int64] | None, marked: dict[int, EscapedText]
    ) -> tuple[Tokens, NDArray[np.int64] | None]:
        """The tokens in which special tokens that texts spell are plain text."""
        return replace_texts(
            tokens, chars, {number: self._escaping.encode(text) for number, text in marked.items()}
        )

    def _completion_mask(
        self,
        batch: RenderedBatch,
        tokens: Tokens,
        encoder: Encoder,
        plain: NDArray[np.bool_],
        counts: Counter[str],
    ) -> NDArray[np.bool_]:
        prompts, of = encoder.encode(batch.prompts), np.array(batch.prompt_of)
        if batch.marked_prompts:
            prompts, _ = self._escaped(prompts, None, batch.marked_prompts)
        if self._spec.prefix_ids and plain.any():
            prompts, _ = _surrounded(prompts, plain[of], self._spec.prefix_ids, ())
        # Texts without a prompt have an empty one: their completion starts at their first token.
        lengths = np.zeros(len(batch.texts), dtype=np.int64)
        lengths[of] = np.diff(prompts.offsets)
        starts = completion_starts(
            prompts.input_ids, to_offsets(lengths), tokens.input_ids, tokens.offsets
        )
        merged = int(np.count_nonzero(starts < lengths))
        if merged:
            counts["warnings.prompt_not_prefix"] += merged
        return mask_from(starts, tokens.offsets)


def _parts(
    batch: RenderedBatch, chars: NDArray[np.int64] | None, tokens: Tokens
) -> tuple[NDArray[np.bool_], NDArray[np.float32] | None]:
    """Which tokens the spans of the texts train, all where chars is None, and what they weigh where
    any weighs other than 1."""
    if chars is None:
        return np.ones(len(tokens.input_ids), dtype=np.bool_), None
    mask = mask_spans(batch.spans, chars, tokens.offsets)
    return mask, weigh_spans(batch.weights, chars, tokens.offsets, mask) if batch.weights else None


def _surrounded(
    tokens: Tokens, where: NDArray[np.bool_], prefix: tuple[int, ...], suffix: tuple[int, ...]
) -> tuple[Tokens, NDArray[np.int64]]:
    """Tokens with `prefix` before and `suffix` after each sequence that `where` marks, and the
    place of each old id."""
    lengths = np.diff(tokens.offsets)
    offsets = to_offsets(lengths + where * (len(prefix) + len(suffix)))
    ids = np.empty(int(offsets[-1]), dtype=np.int32)
    shift = offsets[:-1] + where * len(prefix) - tokens.offsets[:-1]
    place_of = np.arange(len(tokens.input_ids)) + np.repeat(shift, lengths)
    ids[place_of] = tokens.input_ids
    for place, token in enumerate(prefix):
        ids[offsets[:-1][where] + place] = token
    for place, token in enumerate(suffix):
        ids[offsets[1:][where] - len(suffix) + place] = token
    return Tokens(ids, offsets), place_of


def _placed(values: NDArray[_Value], length: int, place_of: NDArray[np.int64]) -> NDArray[_Value]:
    """`values` at the places of their tokens among `length`; what is new between them is trained,
    and weighs 1."""
    wider = np.ones(length, dtype=values.dtype)
    wider[place_of] = values
    return wider


def _merged(rows: Sequence[int], own: Masked, others: Masked) -> Masked:
    """The batch of `own` with the texts of `others` at these numbers, in order."""
    offsets, tokens = own.tokens.offsets, own.tokens.replace(rows, others.tokens)
    ends = others.tokens.offsets

    def with_others(values: NDArray[_Value], new: NDArray[_Value]) -> NDArray[_Value]:
        parts = {k: new[ends[place] : ends[place + 1]] for place, k in enumerate(rows)}
        return replace_segments(values, offsets, parts)

    mask, weights = with_others(own.mask, others.mask), None
    if others.weights is not None:
        weights = with_others(np.ones(len(own.mask), np.float32), others.weights) * mask
    return Masked(tokens, mask, weights)
