"""Pass 1 for the lines of one partition: read, convert, render, encode, mask, cut. A pure function of bytes and recipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial

import numpy as np
from numpy.typing import NDArray

from sftprep.batch import Example, Message, Rejected, TokenBatch
from sftprep.engine.recipe import Recipe
from sftprep.errors import TemplateError
from sftprep.masking import completion_starts, mask_from, mask_spans
from sftprep.records import Unusable, read_record
from sftprep.sources.jsonl import excerpt, parse_line, split_lines
from sftprep.tokenize.beside import Beside
from sftprep.tokenize.encoder import Encoder, EncoderFault, Tokens, load_encoder
from sftprep.tokenize.hf import HfEncoder
from sftprep.tokenize.spot import EVERY, spot_check, spot_numbers

Span = tuple[int, int]


@dataclass(slots=True)
class _Texts:
    """Rendered examples, side by side: text k is of record line origin[k]; plain texts get the tokenizer's own prefix and
    suffix, rendered conversations do not; prompts[j] is the prompt of text prompt_of[j]; spans[k]: assistant turns."""

    texts: list[str] = field(default_factory=list)
    origin: list[int] = field(default_factory=list)
    plain: list[bool] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    prompt_of: list[int] = field(default_factory=list)
    spans: list[tuple[Span, ...]] = field(default_factory=list)


class Preparer:
    """A recipe made ready to run: its tokenizer and template loaded once, used for many partitions."""

    def __init__(self, recipe: Recipe, *, threads: bool) -> None:
        """threads: the encoder may use every core. Raises TemplateError, TokenizerError."""
        self.recipe = recipe
        self.template = recipe.template()
        self.reading = recipe.reading()
        self._threads = threads
        self._reference = cache(partial(HfEncoder, recipe.tokenizer, threads=threads))

    @cached_property
    def _encoder(self) -> Encoder:
        return load_encoder(self.recipe.tokenizer, self.recipe.encoder, threads=self._threads, reference=self._reference)

    @cached_property
    def _check_with(self) -> Callable[[Sequence[str]], Tokens]:
        """What the spot check compares with; where another core is free, it loads there."""
        if self._threads and self.recipe.encoder != HfEncoder.name:
            return Beside(self.recipe.tokenizer, self._reference).encode
        return lambda texts: self._reference().encode(texts)

    def prepare(self, data: bytes, format_name: str, *, seed: int) -> TokenBatch:
        """The sequences of whole lines of JSON. Records that cannot be used are in `rejected`, in the order of their lines.

        seed: chooses the texts that the reference encodes too; where it gives other ids, it encodes this partition.
        """
        counts: Counter[str] = Counter()
        rejected: list[Rejected] = []
        examples = self._read(data, format_name, rejected, counts)
        texts = self._render(examples, rejected, counts)
        if spot_numbers(EVERY, len(texts.texts), seed):
            _ = self._check_with  # starts to load now, while the encoder does
        try:
            batch = self._tokenize(texts, self._encoder, counts, seed)
        except EncoderFault:
            counts["warnings.encoder_failed_over"] += 1
            batch = self._tokenize(texts, self._reference(), counts, seed)
        batch = _without_untrained(_truncated(batch, self.recipe.max_length, counts), counts)
        batch.rejected = sorted(rejected, key=lambda r: r.line)
        batch.counts = dict(counts)
        return batch

    def _read(self, data: bytes, format_name: str, rejected: list[Rejected], counts: Counter[str]) -> list[Example]:
        lines = split_lines(data)
        examples: list[Example] = []
        blank = 0
        for number, line in enumerate(lines):
            record = parse_line(line, number)
            if isinstance(record, dict):
                try:
                    examples.append(read_record(record, number, format_name, self.reading))
                except Unusable as problem:
                    rejected.append(Rejected(number, 0, problem.reason, str(problem), excerpt(line)))
            elif record is None:
                blank += 1
            else:
                rejected.append(record)
        counts.update(lines=len(lines), blank=blank, records=len(lines) - blank)
        return examples

    def _render(self, examples: list[Example], rejected: list[Rejected], counts: Counter[str]) -> _Texts:
        out = _Texts()
        for example in examples:
            try:
                if example.messages is not None:
                    self._render_chat(example, example.messages, out, counts)
                else:
                    self._render_plain(example, out)
            except TemplateError as problem:
                shown = str(example.messages)[:2000]
                rejected.append(Rejected(example.origin, 0, "template_error", problem.message, excerpt(shown)))
        return out

    def _render_chat(self, example: Example, messages: list[Message], out: _Texts, counts: Counter[str]) -> None:
        template, recipe = self.template, self.recipe
        if template is None:
            raise TemplateError("there is no chat template")
        whole = template.render(messages, tools=example.tools, template_kwargs=example.template_kwargs)
        if example.prompt_messages is not None and recipe.train_on != "all":
            # Rendered before anything is stored, so that a template that refuses the prompt leaves nothing half done.
            head = template.render(
                example.prompt_messages, tools=example.tools, add_generation_prompt=True, template_kwargs=example.template_kwargs
            )
            out.prompts.append(head.text)
            out.prompt_of.append(len(out.texts))
        if not self.reading.tool_calls and any("tool_calls" in message for message in messages):
            counts["warnings.tool_calls_not_shown"] += 1
        out.texts.append(whole.text)
        out.origin.append(example.origin)
        out.plain.append(False)
        out.spans.append(whole.spans)

    def _render_plain(self, example: Example, out: _Texts) -> None:
        spec = self.recipe.tokenizer
        if example.text is not None:
            text = example.text
        else:
            prompt, completion = example.prompt or "", example.completion or ""
            text = prompt + completion
            if self.recipe.train_on != "all":
                out.prompts.append(prompt)
                out.prompt_of.append(len(out.texts))
        # The token is written as text, as TRL does, so that it lands in the one pass of the encoder; a tokenizer that adds
        # its own end token to every text has done it already.
        if spec.eos_token is not None and spec.eos_token_id not in spec.suffix_ids and not text.endswith(spec.eos_token):
            text += spec.eos_token
        out.texts.append(text)
        out.origin.append(example.origin)
        out.plain.append(True)
        out.spans.append(())

    def _tokenize(self, texts: _Texts, encoder: Encoder, counts: Counter[str], seed: int) -> TokenBatch:
        spec = self.recipe.tokenizer
        tokens = encoder.encode(texts.texts)
        # A partition's check depends on the partition alone, so that its outcome does not depend on the workers.
        mismatch = spot_check(encoder, self._check_with, texts.texts, tokens, seen=EVERY, seed=seed)
        if mismatch is not None:
            raise EncoderFault("other ids than tokenizers", mismatch)
        plain = np.array(texts.plain, dtype=np.bool_)
        mask = np.ones(len(tokens.input_ids), dtype=np.bool_)
        if self.recipe.train_on == "assistant":
            mask = mask_spans(texts.spans, encoder.token_chars(texts.texts, tokens), tokens.offsets)
            # Plain prompt and completion have no turns; their completion is what the assistant says.
            mask |= np.repeat(plain, np.diff(tokens.offsets))
        ids, offsets = tokens.input_ids, tokens.offsets
        if plain.any() and (spec.prefix_ids or spec.suffix_ids):
            ids, offsets, mask = _surrounded(tokens, mask, plain, spec.prefix_ids, spec.suffix_ids)
        if texts.prompts:
            mask &= self._completion_mask(texts, encoder, plain, ids, offsets, counts)
        return TokenBatch(ids, offsets, mask, np.array(texts.origin, dtype=np.int64))

    def _completion_mask(
        self,
        texts: _Texts,
        encoder: Encoder,
        plain: NDArray[np.bool_],
        ids: NDArray[np.int32],
        offsets: NDArray[np.int64],
        counts: Counter[str],
    ) -> NDArray[np.bool_]:
        prompts, of = encoder.encode(texts.prompts), np.array(texts.prompt_of)
        prompt_ids, prompt_offsets = prompts.input_ids, prompts.offsets
        if self.recipe.tokenizer.prefix_ids and plain.any():
            whole = np.ones(len(prompt_ids), dtype=np.bool_)
            prompt_ids, prompt_offsets, _ = _surrounded(prompts, whole, plain[of], self.recipe.tokenizer.prefix_ids, ())
        # Texts without a prompt have an empty one: their completion starts at their first token.
        lengths = np.zeros(len(texts.texts), dtype=np.int64)
        lengths[of] = np.diff(prompt_offsets)
        all_offsets = np.concatenate(([0], np.cumsum(lengths)))
        starts = completion_starts(prompt_ids, all_offsets, ids, offsets)
        merged = int(np.count_nonzero(starts < lengths))
        if merged:
            counts["warnings.prompt_not_prefix"] += merged
        return mask_from(starts, offsets)


def _surrounded(
    tokens: Tokens, mask: NDArray[np.bool_], where: NDArray[np.bool_], prefix: tuple[int, ...], suffix: tuple[int, ...]
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.bool_]]:
    """Ids, offsets and mask with `prefix` before and `suffix` after each sequence that `where` marks; both are trained."""
    lengths = np.diff(tokens.offsets)
    offsets = np.concatenate(([0], np.cumsum(lengths + where * (len(prefix) + len(suffix)))))
    ids = np.empty(int(offsets[-1]), dtype=np.int32)
    shift = offsets[:-1] + where * len(prefix) - tokens.offsets[:-1]
    place_of = np.arange(len(tokens.input_ids)) + np.repeat(shift, lengths)
    ids[place_of] = tokens.input_ids
    wider = np.ones(len(ids), dtype=np.bool_)
    wider[place_of] = mask
    for place, token in enumerate(prefix):
        ids[offsets[:-1][where] + place] = token
    for place, token in enumerate(suffix):
        ids[offsets[1:][where] - len(suffix) + place] = token
    return ids, offsets, wider


def _truncated(batch: TokenBatch, max_length: int, counts: Counter[str]) -> TokenBatch:
    """Each sequence cut to its first `max_length` tokens, with what is cut off counted."""
    lengths = batch.lengths
    counts["tokens_in"] = int(batch.offsets[-1])
    kept = np.minimum(lengths, max_length)
    cut = lengths - kept
    counts["truncated"] = int(np.count_nonzero(cut))
    counts["tokens_truncated"] = int(cut.sum())
    return _gathered(batch, np.arange(len(lengths)), kept) if counts["truncated"] else batch


def _without_untrained(batch: TokenBatch, counts: Counter[str]) -> TokenBatch:
    """Without the sequences that train nothing: no token is marked beyond their first, which nothing predicts."""
    lengths = batch.lengths
    there = lengths > 0
    firsts = batch.offsets[:-1][there]
    targets = np.zeros(len(lengths), dtype=np.int64)
    if len(firsts):
        marks = batch.completion_mask.view(np.uint8)
        targets[there] = np.add.reduceat(marks, firsts, dtype=np.int64) - marks[firsts]
    trained = targets > 0
    counts["trained_tokens"] = int(targets[trained].sum())
    counts["sequences"] = int(np.count_nonzero(trained))
    if not trained.all():
        counts["dropped.no_trained_token"] = int(np.count_nonzero(~trained))
        counts["tokens_dropped.no_trained_token"] = int(lengths[~trained].sum())
        batch = _gathered(batch, np.flatnonzero(trained), lengths[trained])
    counts["tokens"] = int(batch.offsets[-1])
    return batch


def _gathered(batch: TokenBatch, which: NDArray[np.int64], lengths: NDArray[np.int64]) -> TokenBatch:
    """The first `lengths[i]` tokens of each sequence `which[i]`."""
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    source = np.arange(int(offsets[-1])) + np.repeat(batch.offsets[:-1][which] - offsets[:-1], lengths)
    return TokenBatch(batch.input_ids[source], offsets, batch.completion_mask[source], batch.origin[which])
