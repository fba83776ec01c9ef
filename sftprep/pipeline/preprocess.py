"""Pass 1 for the lines of one partition: read, render, encode, mask, and fit the length.

It is a pure function of the bytes and the recipe. A build and a stream use the same function.
"""

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
from sftprep.pipeline.overlong import drop_untrained, fit_lengths
from sftprep.recipe import Recipe
from sftprep.records.formats import record_reader
from sftprep.records.options import InvalidRecord
from sftprep.records.pretokenized import to_token_batch
from sftprep.records.quality_checks import make_quality_check
from sftprep.render.renderer import Renderer
from sftprep.sources.readers.jsonl import excerpt, parse_line, split_lines
from sftprep.tokenize.encoders.base import EncoderFault
from sftprep.tokenize.equivalence.verified_encoder import PartitionEncoder, VerifiedEncoder

# Maps every digit to "0", so that a substring search finds long numbers: five times as fast as a
# regular expression.
_DIGITS_TO_0 = bytes(48 if 48 <= byte < 58 else byte for byte in range(256))
_LONG_NUMBER = b"0" * 19


class Preprocessor:
    """The stages of pass 1 for one recipe, loaded once and used for many partitions.

    Args:
        recipe: The recipe.
        threads: Whether the encoder may use every core.

    Raises:
        TemplateError: The chat template does not compile.
        TokenizerError: The tokenizer cannot be used.
    """

    def __init__(self, recipe: Recipe, *, threads: bool) -> None:
        self.recipe = recipe
        self.reading = recipe.record_options()  # how records are read
        self.renderer = Renderer(recipe)  # examples to texts
        # Texts to ids.
        self.encoder = VerifiedEncoder(recipe.tokenizer, recipe.encoder, threads=threads)
        self.masks = LossMask(recipe.tokenizer, self.renderer)  # which tokens are trained
        # Raises InvalidRecord for an example that fails a quality check; None: nothing is checked.
        self.quality_check = (
            make_quality_check(recipe.tokenizer, escaped=recipe.escape_special)
            if recipe.reject_suspects
            else None
        )
        # The ids of the tokenizer's added tokens, any of which may end a turn.
        self.added: NDArray[np.int32] = np.array(
            list(recipe.tokenizer.added_tokens().values()), dtype=np.int32
        )

    def load(self) -> None:
        """Load the encoder now, and not with the first partition."""
        _ = self.encoder.fast


def preprocess(
    stages: Preprocessor, data: bytes, format_name: str, *, seed: int | None, first: int = 0
) -> TokenBatch:
    """Return the sequences of whole lines of JSON.

    Args:
        stages: The stages for the recipe.
        data: The lines of the partition.
        format_name: The format of the records.
        seed: Selects the texts that the reference encoder encodes as well. If their ids differ, the
            reference encoder encodes the whole partition. None: nothing is compared.
        first: The number of texts at the start that are compared in addition.

    Returns:
        The sequences. Records that cannot be used are in `rejected`, in the order of their lines.
    """
    return begin_preprocess(stages, data, format_name, seed=seed, first=first)()


def begin_preprocess(
    stages: Preprocessor, data: bytes, format_name: str, *, seed: int | None, first: int = 0
) -> Callable[[], TokenBatch]:
    """Start `preprocess`, and return a function that completes it.

    Everything is done here that does not need the reference encoder, which may still be loading.
    The returned function waits for it.
    """
    repeat_by_reference = partial(_preprocess_by_reference, stages, data, format_name)
    samples_at_start = first if format_name != "tokens" else 0
    partition = stages.encoder.partition(seed=seed, first=samples_at_start)
    try:
        batch = _make_sequences(stages, data, format_name, partition)
    except EncoderFault as fault:
        return partial(repeat_by_reference, fault)

    def complete() -> TokenBatch:
        fault = partition.verify()
        return batch if fault is None else repeat_by_reference(fault)

    return complete


def _preprocess_by_reference(
    stages: Preprocessor, data: bytes, format_name: str, fault: EncoderFault
) -> TokenBatch:
    """Repeat a partition with the reference encoder, because the fast one gave other ids."""
    stages.encoder.report(fault)
    partition = stages.encoder.partition_by_reference()
    batch = _make_sequences(stages, data, format_name, partition)
    batch.counts["warnings.encoder_failed_over"] = 1
    return batch


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    # A partition creates a million objects without a reference cycle; the search for cycles takes a
    # tenth of the time.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_without_garbage_collection()
def _make_sequences(
    stages: Preprocessor, data: bytes, format_name: str, partition: PartitionEncoder
) -> TokenBatch:
    """Return the sequences of a partition by one encoder, or raise EncoderFault."""
    recipe, counts = stages.recipe, Counter[str]()
    rejected: list[Rejected] = []
    content = ByteSearcher(data)
    examples = read_examples(stages, content, format_name, rejected, counts)
    if format_name == "tokens":
        batch = to_token_batch(examples, recipe.tokenizer.vocab_size, rejected, counts)
    else:
        batch = _encode_examples(stages, content, examples, partition, rejected, counts)
    batch = fit_lengths(
        batch, recipe.overlong, recipe.max_length, recipe.truncate_side, counts, rejected
    )
    batch = drop_untrained(batch, counts)
    _add_excerpts(rejected, data)
    batch.rejected = sorted(rejected, key=lambda record: record.line)
    batch.counts = dict(counts)
    return batch


def _encode_examples(
    stages: Preprocessor,
    content: ByteSearcher,
    examples: list[Example],
    partition: PartitionEncoder,
    rejected: list[Rejected],
    counts: Counter[str],
) -> TokenBatch:
    """Render, encode and mask the examples of a partition."""
    recipe, renderer = stages.recipe, stages.renderer
    # 1. Render, and count the backend (compiled template or Jinja) of each conversation.
    before = renderer.backend_counts()
    watch = recipe.escape_special or renderer.special_tokens.may_be_in(content)
    texts = renderer.render(examples, rejected, counts, watch=watch)
    renders = renderer.backend_counts() - before
    counts.update({f"template.{backend}": number for backend, number in renders.items()})
    # 2. Encode.
    tokens = partition.encode(texts.texts)
    # 3. Mask. This adds the tokenizer's prefix and suffix to plain texts, so it returns tokens too.
    tokens, mask, weights = stages.masks.mask(
        texts, tokens, partition.encoder, counts, partition.samples
    )
    origin = np.array(texts.origin, dtype=np.int64)
    batch = TokenBatch(tokens.input_ids, tokens.offsets, mask, origin, loss_weights=weights)
    # 4. Count suspicious patterns for the summary.
    count_double_bos(batch, recipe.tokenizer, counts)
    if recipe.train_on != "all":
        count_untrained_ends(batch, ~np.array(texts.plain, np.bool_), stages.added, counts)
    return batch


def read_examples(
    stages: Preprocessor,
    content: ByteSearcher,
    format_name: str,
    rejected: list[Rejected],
    counts: Counter[str],
) -> list[Example]:
    """Return the examples of all lines.

    Args:
        stages: The stages for the recipe.
        content: The lines of the partition, as bytes that can be searched.
        format_name: The format of the records.
        rejected: Receives the records that cannot be used.
        counts: Receives the numbers of lines, lines of whitespace and records.
    """
    data, quality_check = content.data, stages.quality_check
    lines, read = split_lines(data), record_reader(format_name, stages.reading)
    # orjson turns integers beyond 64 bits into floats, which a template would show in tools and
    # tool calls. Such lines are parsed again by Python.
    has_tools = _may_have_calls(data)
    examples: list[Example] = []
    blank = 0
    for number, line in enumerate(lines):
        record = parse_line(line, number)
        if type(record) is dict:
            try:
                if has_tools and _may_have_calls(line) and _has_long_number(line):
                    record = _parse_exact_integers(line)
                example = read(record, number)
                if quality_check is not None:
                    quality_check(example)
                examples.append(example)
                if example.images_dropped:
                    counts["warnings.images_dropped"] += 1
            except InvalidRecord as problem:
                rejected.append(Rejected(number, 0, problem.reason, str(problem), excerpt(line)))
        elif isinstance(record, Rejected):
            rejected.append(record)
        else:
            blank += 1
    counts.update(lines=len(lines), blank=blank, records=len(lines) - blank)
    return examples


def _may_have_calls(data: bytes) -> bool:
    return b'"tool' in data or b'"function' in data


def _has_long_number(line: bytes) -> bool:
    return _LONG_NUMBER in line.translate(_DIGITS_TO_0)


def _parse_exact_integers(line: bytes) -> dict[str, Any]:
    """Parse a line that orjson accepts, with all digits of its integers.

    Raises:
        InvalidRecord: Python does not accept the line.
    """
    try:
        record: dict[str, Any] = json.loads(line)
    except (ValueError, RecursionError) as error:  # Python reads at most 4,300 digits
        what = "a number has too many digits, or values are nested too deeply"
        raise InvalidRecord("bad_json", what) from error
    return record


def _add_excerpts(rejected: list[Rejected], data: bytes) -> None:
    """Add an excerpt of its line to each rejected record without one."""
    without_excerpt = [record for record in rejected if not record.excerpt]
    if without_excerpt:
        lines = split_lines(data)
        for record in without_excerpt:
            record.excerpt = excerpt(lines[record.line])
