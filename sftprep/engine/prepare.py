"""Pass 1 for the lines of one partition: read, convert, render, encode, mask, cut. A pure function
of bytes and recipe."""

from __future__ import annotations

import gc
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property, partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from sftprep.batch import Example, Rejected, TokenBatch
from sftprep.engine.columns import Columns
from sftprep.engine.lengths import fit_lengths, without_untrained
from sftprep.engine.recipe import Recipe
from sftprep.engine.texts import Renderer, Texts
from sftprep.engine.warnings import count_double_bos, count_untrained_ends
from sftprep.given import given_batch
from sftprep.lookup import Letters
from sftprep.masking import completion_starts, mask_from, mask_spans, weigh_spans
from sftprep.ragged import edges
from sftprep.records import Unusable, read_record
from sftprep.sources.jsonl import excerpt, line_edges, parse_line, split_lines
from sftprep.sources.lines import LARGEST_LINE
from sftprep.suspects import suspect_check
from sftprep.tokenize.beside import Asking, Beside, Place
from sftprep.tokenize.encoder import Encoder, EncoderFault, Tokens, load_encoder
from sftprep.tokenize.escaped import EscapedEncoder, Marked, with_replaced
from sftprep.tokenize.fast import FastEncoder
from sftprep.tokenize.hf import HfEncoder
from sftprep.tokenize.spot import SpotChecks

# Every digit made a 0, so that a long number is found by a plain look, five times as fast as by an
# expression.
_DIGITS_AS_0 = bytes(48 if 48 <= byte < 58 else byte for byte in range(256))
_LONG_NUMBER = b"0" * 19
_Value = TypeVar("_Value", np.bool_, np.float32)
_log = logging.getLogger(__name__)


@contextmanager
def _without_collection() -> Iterator[None]:
    # A partition makes a million objects and no cycle among them: looking for some takes a tenth of
    # the time.
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class Preparer:
    """A recipe made ready to run: its tokenizer and template loaded once, used for many
    partitions."""

    def __init__(self, recipe: Recipe, *, threads: bool) -> None:
        """threads: the encoder may use every core. Raises TemplateError, TokenizerError."""
        self.recipe = recipe
        self._renderer = Renderer(recipe)
        self.reading = recipe.reading()
        self._suspect = (
            suspect_check(recipe.tokenizer, escaped=recipe.escape_special)
            if recipe.reject_suspects
            else None
        )
        self._columns = Columns(recipe, self.reading, self._renderer.whole_template)
        self._threads = threads
        self._told = False
        self._reference = cache(partial(HfEncoder, recipe.tokenizer, threads=threads))
        self._asked: Place | None = None
        self._beside: Beside | None = None

    def load(self) -> None:
        """Load now what the first partition would load."""
        _ = self._encoder

    def ask(self, place: Place | None) -> None:
        """Let the child there have the reference encoder, instead of one of this process; None: as
        before."""
        if place is not None and place != self._asked:
            self._asked = place
            self.__dict__.pop("_check_with", None)

    @cached_property
    def _encoder(self) -> Encoder:
        return load_encoder(
            self.recipe.tokenizer,
            self.recipe.encoder,
            threads=self._threads,
            reference=self._reference,
        )

    @cached_property
    def _check_with(self) -> Callable[[Sequence[str]], Callable[[], Tokens]]:
        """What the spot check compares with; where another core is free, it loads there."""
        if self._asked is None and self._threads and self.recipe.encoder != HfEncoder.name:
            self._beside = Beside(self.recipe.tokenizer)
            self._asked = self._beside.place
        return Asking(self._asked, self._reference).ask

    def _compared(self, texts: Sequence[str]) -> Callable[[], Tokens]:
        return self._check_with(texts)  # made when there is something to compare

    def prepare(
        self, data: bytes, format_name: str, *, seed: int | None, sample: int = 0
    ) -> TokenBatch:
        """The sequences of whole lines of JSON. Records that cannot be used are in `rejected`, in
        the order of their lines.

        seed: chooses the texts that the reference encodes too, and the first `sample` ones with
        them; where it gives other ids, it encodes this partition. None: nothing is compared.
        """
        return self.begin(data, format_name, seed=seed, sample=sample)()

    def begin(
        self, data: bytes, format_name: str, *, seed: int | None, sample: int = 0
    ) -> Callable[[], TokenBatch]:
        """`prepare`, but for waiting for the reference, which may still be loading: what it returns
        does that."""
        if sample and format_name != "tokens":
            _ = (
                self._check_with
            )  # starts to load now, while this process reads and loads the encoder
        # What the reference encodes is not compared with the reference.
        compared = seed is not None and self.recipe.encoder != HfEncoder.name
        checks = SpotChecks(self._compared if compared else None, seed=seed or 0, first=sample)
        try:
            batch = self._sequences(data, format_name, lambda: self._encoder, checks)
        except EncoderFault as fault:
            return partial(self._failed_over, fault, data, format_name)

        def checked() -> TokenBatch:
            mismatch = checks.mismatch()
            if mismatch is None:
                return batch
            return self._failed_over(
                EncoderFault("other ids than tokenizers", mismatch), data, format_name
            )

        return checked

    def _failed_over(self, fault: EncoderFault, data: bytes, format_name: str) -> TokenBatch:
        if (
            not self._told
        ):  # the first fault of the fast encoder in this process is logged; all are counted
            self._told = True
            _log.warning("%s is not used for a part of the records: %s", self.recipe.encoder, fault)
        batch = self._sequences(data, format_name, self._reference, SpotChecks(None))
        batch.counts["warnings.encoder_failed_over"] = 1
        return batch

    @_without_collection()
    def _sequences(
        self, data: bytes, format_name: str, encoder: Callable[[], Encoder], checks: SpotChecks
    ) -> TokenBatch:
        """What `prepare` gives, by one encoder. Raises EncoderFault."""
        counts: Counter[str] = Counter()
        rejected: list[Rejected] = []
        if format_name == "tokens":
            examples = self._read(Letters(data), format_name, rejected, counts)
            batch = given_batch(examples, self.recipe.tokenizer.vocab_size, rejected, counts)
        else:
            texts = self._texts(data, format_name, rejected, counts)
            batch = self._encoded(texts, encoder(), counts, checks)
        recipe = self.recipe
        batch = fit_lengths(
            batch, recipe.overlong, recipe.max_length, recipe.truncate_side, counts, rejected
        )
        batch = without_untrained(batch, counts)
        _show(rejected, data)
        batch.rejected = sorted(rejected, key=lambda r: r.line)
        batch.counts = dict(counts)
        return batch

    def _encoded(
        self, texts: Texts, encoder: Encoder, counts: Counter[str], checks: SpotChecks
    ) -> TokenBatch:
        framed = self._framed(texts, encoder, checks)
        if framed is None:
            texts, framed = texts.rendered(), []
        batch = self._tokenize(texts, encoder, counts, checks)
        chats = ~np.array(texts.plain, dtype=np.bool_)
        for own, are_chats in [
            (batch, chats),
            *((each, np.ones(len(each.origin), np.bool_)) for each in framed),
        ]:
            count_double_bos(own, self.recipe.tokenizer, counts)
            if self.recipe.train_on != "all":
                count_untrained_ends(own, are_chats, self._added, counts)
        for each in framed:
            batch = batch.with_others(each)
        return batch

    def _framed(
        self, texts: Texts, encoder: Encoder, checks: SpotChecks
    ) -> list[TokenBatch] | None:
        """The sequences of conversations without their texts; None where those are needed."""
        made: list[TokenBatch] = []
        for each in texts.framed:
            if not isinstance(encoder, FastEncoder):
                return None
            check = checks.begin(each)
            tokens = each.encode(encoder)
            if tokens is None:
                return None
            check(tokens)
            mask = np.ones(len(tokens.input_ids), dtype=np.bool_)
            made.append(
                TokenBatch(
                    tokens.input_ids, tokens.offsets, mask, np.array(each.origin, dtype=np.int64)
                )
            )
        return made

    @cached_property
    def _added(self) -> NDArray[np.int32]:
        return np.array(list(self.recipe.tokenizer.added_tokens().values()), dtype=np.int32)

    def _texts(
        self, data: bytes, format_name: str, rejected: list[Rejected], counts: Counter[str]
    ) -> Texts:
        """Plain lines by columns, where no text needs a look of its own, and all others one by
        one."""
        letters = Letters(data)
        watch = self.recipe.escape_special or self._renderer.spelled.may_be_in(letters)
        watch |= len(data) > LARGEST_LINE  # a line may be too long, which columns do not check
        before = self._renderer.ways()
        plain = Texts() if watch else self._columns.texts(letters, format_name, counts)
        examples = self._read(letters, format_name, rejected, counts, but=plain.lines)
        texts = plain.with_others(self._renderer.render(examples, rejected, counts, watch=watch))
        counts.update(
            {f"template.{way}": number for way, number in (self._renderer.ways() - before).items()}
        )
        return texts

    def _read(
        self,
        letters: Letters,
        format_name: str,
        rejected: list[Rejected],
        counts: Counter[str],
        *,
        but: Sequence[int] = (),
    ) -> list[Example]:
        """The examples of all lines but some."""
        data = letters.data
        begins = line_edges(letters)
        total = len(begins) - 1
        examples: list[Example] = []
        blank = 0
        suspect = self._suspect
        others = np.ones(total, dtype=np.bool_)
        others[list(but)] = False
        numbers = np.flatnonzero(others)
        for number, begin, end in zip(
            numbers.tolist(), begins[numbers].tolist(), begins[numbers + 1].tolist(), strict=True
        ):
            line = data[begin : end - 1]
            record = parse_line(line, number)
            if isinstance(record, dict):
                if b'"tool' in line and _LONG_NUMBER in line.translate(_DIGITS_AS_0):
                    # orjson makes fractions of whole numbers beyond 64 bits, which templates would
                    # show in tools and calls.
                    record = json.loads(line)
                try:
                    example = read_record(record, number, format_name, self.reading)
                    if suspect is not None:
                        suspect(example)
                    examples.append(example)
                except Unusable as problem:
                    rejected.append(
                        Rejected(number, 0, problem.reason, str(problem), excerpt(line))
                    )
            elif record is None:
                blank += 1
            else:
                rejected.append(record)
        counts.update(lines=total, blank=blank, records=total - blank)
        return examples

    def _tokenize(
        self, texts: Texts, encoder: Encoder, counts: Counter[str], checks: SpotChecks
    ) -> TokenBatch:
        spec = self.recipe.tokenizer
        check = checks.begin(texts.texts)
        tokens = encoder.encode(texts.texts)
        check(tokens)
        plain = np.array(texts.plain, dtype=np.bool_)
        chars = encoder.token_chars(texts.texts, tokens) if texts.have_parts else None
        if texts.marked:
            tokens, chars = self._escaped(tokens, chars, texts.marked)
        mask, weights = _parts(texts, chars, tokens)
        ids, offsets = tokens.input_ids, tokens.offsets
        if plain.any() and (spec.prefix_ids or spec.suffix_ids):
            ids, offsets, place_of = _surrounded(tokens, plain, spec.prefix_ids, spec.suffix_ids)
            mask, weights = (
                _placed(mask, len(ids), place_of),
                weights if weights is None else _placed(weights, len(ids), place_of),
            )
        if texts.prompts:
            mask &= self._completion_mask(texts, encoder, plain, ids, offsets, counts)
        if weights is not None:
            weights *= mask
        return TokenBatch(
            ids, offsets, mask, np.array(texts.origin, dtype=np.int64), loss_weights=weights
        )

    @cached_property
    def _escaping(self) -> EscapedEncoder:
        return EscapedEncoder(self.recipe.tokenizer)

    def _escaped(
        self, tokens: Tokens, chars: NDArray[np.int64] | None, marked: dict[int, Marked]
    ) -> tuple[Tokens, NDArray[np.int64] | None]:
        """The tokens in which special tokens that texts spell are plain text."""
        return with_replaced(
            tokens, chars, {number: self._escaping.encode(text) for number, text in marked.items()}
        )

    def _completion_mask(
        self,
        texts: Texts,
        encoder: Encoder,
        plain: NDArray[np.bool_],
        ids: NDArray[np.int32],
        offsets: NDArray[np.int64],
        counts: Counter[str],
    ) -> NDArray[np.bool_]:
        prompts, of = encoder.encode(texts.prompts), np.array(texts.prompt_of)
        if texts.marked_prompts:
            prompts, _ = self._escaped(prompts, None, texts.marked_prompts)
        prompt_ids, prompt_offsets = prompts.input_ids, prompts.offsets
        if self.recipe.tokenizer.prefix_ids and plain.any():
            prompt_ids, prompt_offsets, _ = _surrounded(
                prompts, plain[of], self.recipe.tokenizer.prefix_ids, ()
            )
        # Texts without a prompt have an empty one: their completion starts at their first token.
        lengths = np.zeros(len(texts.texts), dtype=np.int64)
        lengths[of] = np.diff(prompt_offsets)
        all_offsets = edges(lengths)
        starts = completion_starts(prompt_ids, all_offsets, ids, offsets)
        merged = int(np.count_nonzero(starts < lengths))
        if merged:
            counts["warnings.prompt_not_prefix"] += merged
        return mask_from(starts, offsets)


def _parts(
    texts: Texts, chars: NDArray[np.int64] | None, tokens: Tokens
) -> tuple[NDArray[np.bool_], NDArray[np.float32] | None]:
    """Which tokens the spans of the texts train, all where chars is None, and what they weigh where
    any weighs other than 1."""
    if chars is None:
        return np.ones(len(tokens.input_ids), dtype=np.bool_), None
    mask = mask_spans(texts.spans, chars, tokens.offsets)
    return mask, weigh_spans(texts.weights, chars, tokens.offsets, mask) if texts.weights else None


def _surrounded(
    tokens: Tokens, where: NDArray[np.bool_], prefix: tuple[int, ...], suffix: tuple[int, ...]
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """Ids and offsets with `prefix` before and `suffix` after each sequence that `where` marks, and
    the place of each old id."""
    lengths = np.diff(tokens.offsets)
    offsets = edges(lengths + where * (len(prefix) + len(suffix)))
    ids = np.empty(int(offsets[-1]), dtype=np.int32)
    shift = offsets[:-1] + where * len(prefix) - tokens.offsets[:-1]
    place_of = np.arange(len(tokens.input_ids)) + np.repeat(shift, lengths)
    ids[place_of] = tokens.input_ids
    for place, token in enumerate(prefix):
        ids[offsets[:-1][where] + place] = token
    for place, token in enumerate(suffix):
        ids[offsets[1:][where] - len(suffix) + place] = token
    return ids, offsets, place_of


def _placed(values: NDArray[_Value], length: int, place_of: NDArray[np.int64]) -> NDArray[_Value]:
    """`values` at the places of their tokens among `length`; what is new between them is trained,
    and weighs 1."""
    wider = np.ones(length, dtype=values.dtype)
    wider[place_of] = values
    return wider


def _show(rejected: list[Rejected], data: bytes) -> None:
    """Give an excerpt of its line to each rejected record that has none yet."""
    bare = [record for record in rejected if not record.excerpt]
    if bare:
        lines = split_lines(data)
        for record in bare:
            record.excerpt = excerpt(lines[record.line])
