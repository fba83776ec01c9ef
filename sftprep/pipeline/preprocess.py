"""Pass 1 for the lines of one partition: read, render, encode, mask, cut. A pure function of bytes
and recipe."""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftprep.core.byte_search import ByteSearcher
from sftprep.core.types import Example, Rejected, TokenBatch
from sftprep.pipeline.diagnostics import count_double_bos, count_untrained_ends
from sftprep.pipeline.loss_mask import LossMask
from sftprep.pipeline.overlong import fit_lengths, without_untrained
from sftprep.recipe import Recipe
from sftprep.records.formats import record_reader
from sftprep.records.options import InvalidRecord
from sftprep.records.pretokenized import to_token_batch
from sftprep.records.quality_checks import make_quality_check
from sftprep.render.renderer import Renderer
from sftprep.sources.readers.jsonl import excerpt, parse_line, split_lines
from sftprep.tokenize.encoders.base import EncoderFault
from sftprep.tokenize.equivalence.verified_encoder import PartitionEncoder, VerifiedEncoder

# Every digit made a 0, so that a long number is found by a plain look, five times as fast as by an
# expression.
_DIGITS_AS_0 = bytes(48 if 48 <= byte < 58 else byte for byte in range(256))
_LONG_NUMBER = b"0" * 19


class Preprocessor:
    """What pass 1 needs of a recipe, loaded once and used for many partitions.

    renderer: records to texts; encoder: texts to ids; masks: which of those are trained.
    """

    def __init__(self, recipe: Recipe, *, threads: bool) -> None:
        """threads: the encoder may use every core. Raises TemplateError, TokenizerError."""
        self.recipe = recipe
        self.reading = recipe.record_options()
        self.renderer = Renderer(recipe)
        self.encoder = VerifiedEncoder(recipe.tokenizer, recipe.encoder, threads=threads)
        self.masks = LossMask(recipe.tokenizer, self.renderer)
        escaped = recipe.escape_special
        self.suspect = (
            make_quality_check(recipe.tokenizer, escaped=escaped)
            if recipe.reject_suspects
            else None
        )
        added = recipe.tokenizer.added_tokens().values()
        self.added: NDArray[np.int32] = np.array(list(added), dtype=np.int32)

    def load(self) -> None:
        """Load now what the first partition would load."""
        _ = self.encoder.fast


def preprocess(
    stages: Preprocessor, data: bytes, format_name: str, *, seed: int | None, first: int = 0
) -> TokenBatch:
    """The sequences of whole lines of JSON. Records that cannot be used are in `rejected`, in the
    order of their lines.

    seed: chooses the texts that the reference encodes too, and the first `first` ones with them;
    where it gives other ids, it encodes this partition. None: nothing is compared.
    """
    return begin_preprocess(stages, data, format_name, seed=seed, first=first)()


def begin_preprocess(
    stages: Preprocessor, data: bytes, format_name: str, *, seed: int | None, first: int = 0
) -> Callable[[], TokenBatch]:
    """`preprocess` as far as it goes without the reference encoder, which may still be loading; the
    result waits for it."""
    by_reference = partial(_failed_over, stages, data, format_name)
    own = stages.encoder.partition(seed=seed, first=first if format_name != "tokens" else 0)
    try:
        batch = _sequences(stages, data, format_name, own)
    except EncoderFault as fault:
        return partial(by_reference, fault)

    def verified() -> TokenBatch:
        fault = own.verify()
        return batch if fault is None else by_reference(fault)

    return verified


def _failed_over(
    stages: Preprocessor, data: bytes, format_name: str, fault: EncoderFault
) -> TokenBatch:
    stages.encoder.report(fault)
    batch = _sequences(stages, data, format_name, stages.encoder.partition_by_reference())
    batch.counts["warnings.encoder_failed_over"] = 1
    return batch


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


@_without_collection()
def _sequences(
    stages: Preprocessor, data: bytes, format_name: str, own: PartitionEncoder
) -> TokenBatch:
    """The sequences by one encoder. Raises EncoderFault."""
    recipe, counts = stages.recipe, Counter[str]()
    rejected: list[Rejected] = []
    letters = ByteSearcher(data)
    examples = read_examples(stages, letters, format_name, rejected, counts)
    if format_name == "tokens":
        batch = to_token_batch(examples, recipe.tokenizer.vocab_size, rejected, counts)
    else:
        batch = _encoded(stages, letters, examples, own, rejected, counts)
    batch = fit_lengths(
        batch, recipe.overlong, recipe.max_length, recipe.truncate_side, counts, rejected
    )
    batch = without_untrained(batch, counts)
    _show(rejected, data)
    batch.rejected = sorted(rejected, key=lambda r: r.line)
    batch.counts = dict(counts)
    return batch


def _encoded(
    stages: Preprocessor,
    letters: ByteSearcher,
    examples: list[Example],
    own: PartitionEncoder,
    rejected: list[Rejected],
    counts: Counter[str],
) -> TokenBatch:
    """Render, encode and mask."""
    recipe, renderer = stages.recipe, stages.renderer
    before = renderer.backend_counts()
    watch = recipe.escape_special or renderer.special_tokens.may_be_in(letters)
    texts = renderer.render(examples, rejected, counts, watch=watch)
    ways = renderer.backend_counts() - before
    counts.update({f"template.{way}": number for way, number in ways.items()})
    tokens = own.encode(texts.texts)
    tokens, mask, weights = stages.masks.mask(texts, tokens, own.encoder, counts, own.samples)
    origin = np.array(texts.origin, dtype=np.int64)
    batch = TokenBatch(tokens.input_ids, tokens.offsets, mask, origin, loss_weights=weights)
    count_double_bos(batch, recipe.tokenizer, counts)
    if recipe.train_on != "all":
        count_untrained_ends(batch, ~np.array(texts.plain, np.bool_), stages.added, counts)
    return batch


def read_examples(
    stages: Preprocessor,
    letters: ByteSearcher,
    format_name: str,
    rejected: list[Rejected],
    counts: Counter[str],
) -> list[Example]:
    """The examples of all lines."""
    data, suspect = letters.data, stages.suspect
    lines, read = split_lines(data), record_reader(format_name, stages.reading)
    # orjson makes fractions of whole numbers beyond 64 bits, which templates would show in tools
    # and calls.
    has_tools = b'"tool' in data
    examples: list[Example] = []
    blank = 0
    for number, line in enumerate(lines):
        record = parse_line(line, number)
        if type(record) is dict:
            try:
                if has_tools and b'"tool' in line and _LONG_NUMBER in line.translate(_DIGITS_AS_0):
                    record = _with_long_numbers(line)
                example = read(record, number)
                if suspect is not None:
                    suspect(example)
                examples.append(example)
            except InvalidRecord as problem:
                rejected.append(Rejected(number, 0, problem.reason, str(problem), excerpt(line)))
        elif isinstance(record, Rejected):
            rejected.append(record)
        else:
            blank += 1
    counts.update(lines=len(lines), blank=blank, records=len(lines) - blank)
    return examples


def _with_long_numbers(line: bytes) -> dict[str, Any]:
    """The record of a line that orjson parses, with all digits of its whole numbers. Raises
    InvalidRecord."""
    try:
        record: dict[str, Any] = json.loads(line)
    except (ValueError, RecursionError) as error:  # Python reads 4,300 digits at most
        what = "a number has too many digits, or values are nested too deeply"
        raise InvalidRecord("bad_json", what) from error
    return record


def _show(rejected: list[Rejected], data: bytes) -> None:
    """Give an excerpt of its line to each rejected record that has none yet."""
    bare = [record for record in rejected if not record.excerpt]
    if bare:
        lines = split_lines(data)
        for record in bare:
            record.excerpt = excerpt(lines[record.line])
