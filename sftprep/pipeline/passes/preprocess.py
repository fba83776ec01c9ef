"""Pass 1 for the lines of one partition: read, render, encode and mask.

It is a pure function of the bytes and the recipe. A build and a stream use the same function.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftprep.config.user_functions import LoadedFunction
from sftprep.core.byte_search import ByteSearcher
from sftprep.core.mask_arrays import find_targets
from sftprep.core.omissions import COLUMN_NOT_READ, SYSTEM_ADDED
from sftprep.core.types import Counts, Example, Flag, Rejected, TokenBatch
from sftprep.pipeline.passes.diagnostics import (
    count_double_bos,
    count_lost_bytes,
    count_unknown,
    count_untrained_ends,
)
from sftprep.pipeline.passes.loss_mask import LossMask
from sftprep.pipeline.passes.overlong import LengthLimit, fit_lengths
from sftprep.recipe import Recipe
from sftprep.records.checks.quality_checks import QualityChecks
from sftprep.records.checks.unread_columns import UnreadColumns
from sftprep.records.formats import record_reader
from sftprep.records.options import (
    InvalidRecord,
    find_long_numbers,
    parse_exactly,
    repeated_key_error,
)
from sftprep.records.pretokenized import to_token_batch
from sftprep.records.record_hashes import RecordHasher
from sftprep.records.transform import RecordFunctions, transform_lines
from sftprep.render.rendered_batch import RenderedBatch
from sftprep.render.renderer import Renderer
from sftprep.sources.readers.jsonl import add_excerpts, excerpt, parse_lines, split_lines
from sftprep.tokenize.encoders.base import Encoder, EncoderFault
from sftprep.tokenize.equivalence.verified_encoder import PartitionEncoder, VerifiedEncoder

_KEYS_OF_OBJECTS = (b'"tool', b'"function', b'"observation', b"template_kwargs")
"""Starts of keys and roles of records in which a template may show a number outside a string."""


_COUNTED = (
    ("images_dropped", "images_dropped"),
    ("system_added", SYSTEM_ADDED),
    ("unread_switch", "switch_not_read"),
)
"""Attributes of examples that are counted, and the kinds of the warnings."""
_ALL_LINES = range(sys.maxsize)
_CONTROLS = bytes((*range(32), 127))
_CONTROL_MARKS = (b"\\u00", b"\\b", b"\\f", b"\x7f")
"""What lines of JSON contain where a text has a control character that vocabularies may lack."""


Observer = Callable[[list[Example], RenderedBatch, Encoder], None]
"""A function that receives the examples of a partition, their texts, and the encoder of the texts,
for display. It must not modify them."""


class Preprocessor:
    """The stages of pass 1 for one recipe, loaded once and used for many partitions.

    Args:
        recipe: The recipe.
        threads: Whether the encoder may use every core.
        observer: Called for each partition that is rendered.

    Raises:
        TemplateError: The chat template does not compile.
        TokenizerError: The tokenizer cannot be used.
    """

    def __init__(self, recipe: Recipe, *, threads: bool, observer: Observer | None = None) -> None:
        self.recipe = recipe
        self.observer = observer
        # By transform: a function is loaded once, even if its file changes in the meantime.
        self._functions: dict[LoadedFunction | None, RecordFunctions | None] = {
            None: recipe.record_functions()
        }
        self.reading = recipe.record_options()  # how records are read
        self.renderer = Renderer(recipe)  # examples to texts
        # Texts to ids.
        self.encoder = VerifiedEncoder(recipe.tokenizer, recipe.encoder, threads=threads)
        self.masks = LossMask(recipe.tokenizer, self.renderer)  # which tokens are trained
        # What is wrong with conversations, or looks wrong.
        self.quality_checks = QualityChecks(
            recipe.tokenizer, escaped=recipe.escape_special, rejects=recipe.reject_suspects
        )
        # The token that replaces characters outside the vocabulary.
        self.unknown_id = recipe.tokenizer.unknown_token_id()
        # The bytes that a vocabulary of bytes lacks, and whether these are only control characters.
        self.missing_bytes = bytes(recipe.tokenizer.missing_bytes)
        self.lacks_letters = bool(self.missing_bytes.translate(None, _CONTROLS))
        # The ids of the tokenizer's added tokens, any of which may end a turn.
        self.added: NDArray[np.int32] = np.array(
            list(recipe.tokenizer.added_tokens().values()), dtype=np.int32
        )

    def functions_with(self, transform: LoadedFunction | None) -> RecordFunctions | None:
        """Return the functions of the user for records with a transform of their own."""
        if transform not in self._functions:
            self._functions[transform] = self.recipe.record_functions(transform)
        return self._functions[transform]

    def reader(self, format_name: str) -> Callable[[dict[str, Any], int], Example]:
        """Return the function for converting records of a format; see `record_reader`."""
        read, for_tools = record_reader(format_name, self.reading), self.recipe.for_tools()
        if for_tools is None:
            return read
        # Conversations with tools have a template of their own, which may show more.
        read_with_tools = record_reader(format_name, for_tools.record_options())
        key = {target: source for source, target in self.recipe.renames}.get("tools", "tools")
        return lambda record, line: (read_with_tools if record.get(key) else read)(record, line)

    def load(self) -> None:
        """Load the encoder now, and not with the first partition."""
        _ = self.encoder.fast


def preprocess(
    stages: Preprocessor,
    data: bytes,
    format_name: str,
    limit: LengthLimit,
    *,
    seed: int | None,
    num_first: int = 0,
    transform: LoadedFunction | None = None,
    hash_by: tuple[str, ...] | None = None,
) -> TokenBatch:
    """Return the sequences of lines of JSON, within a limit and with targets.

    Args:
        stages: The stages for the recipe.
        data: The lines of the partition.
        format_name: The format of the records.
        limit: The limit of their lengths.
        seed: Selects the texts that the reference encoder encodes as well. If their ids differ, the
            reference encoder encodes the whole partition. None: nothing is compared.
        num_first: The number of texts at the start that are compared in addition.
        transform: The transform of these lines, if it is not that of the recipe.
        hash_by: The keys by which records are compared with others, as for `RecordHasher`; None:
            they are not compared.

    Returns:
        The sequences. Records that cannot be used are in `rejected`, in the order of their lines.
    """
    batch = begin_preprocess(
        stages,
        data,
        format_name,
        seed=seed,
        num_first=num_first,
        transform=transform,
        hash_by=hash_by,
    )()
    fitted = fit_lengths(batch, find_targets(batch.completion_mask, batch.offsets), data, limit)
    ranges = fitted.ranges
    fitting = batch.gather(ranges.rows, ranges.lengths, ranges.starts)
    fitting.counts, fitting.rejected = fitted.counts, fitted.rejected
    fitting.first_lines = fitted.first_lines
    return fitting


def begin_preprocess(
    stages: Preprocessor,
    data: bytes,
    format_name: str,
    *,
    seed: int | None,
    num_first: int = 0,
    transform: LoadedFunction | None = None,
    hash_by: tuple[str, ...] | None = None,
) -> Callable[[], TokenBatch]:
    """Start to tokenize lines of JSON; the returned function gives whole sequences.

    The arguments are those of `preprocess`. Everything is done here that does not need the
    reference encoder, which may still be loading. The returned function waits for it.
    """
    functions = stages.functions_with(transform)
    output = None if functions is None else transform_lines(data, functions)
    lines = data if output is None else output.data
    complete_tokens = _begin_tokens(stages, lines, format_name, seed=seed, num_first=num_first)

    def complete() -> TokenBatch:
        batch = complete_tokens()
        if hash_by is not None:
            hasher = RecordHasher(
                format_name, stages.reading, hash_by, stages.recipe.chat_template or ""
            )
            counts = Counts()
            hashes = hasher.hash_records(lines, batch.line_of, counts)
            batch.exact_hashes, batch.near_hashes = hashes
            batch.counts |= counts
            batch.first_lines |= counts.first_lines
        return batch if output is None else output.restore_lines(batch)

    return complete


def _begin_tokens(
    stages: Preprocessor, data: bytes, format_name: str, *, seed: int | None, num_first: int
) -> Callable[[], TokenBatch]:
    """Start to tokenize records as they are; return a function to complete it."""
    repeat_by_reference = partial(_preprocess_by_reference, stages, data, format_name)
    samples_at_start = num_first if format_name != "tokens" else 0
    partition = stages.encoder.partition(seed=seed, num_first=samples_at_start)
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
    """Repeat a partition with the reference encoder after wrong ids of the fast one."""
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
    recipe, counts = stages.recipe, Counts()
    rejected: list[Rejected] = []
    content = ByteSearcher(data)
    examples = read_examples(stages, content, format_name, rejected, counts)
    if format_name == "tokens":
        batch = to_token_batch(examples, recipe.tokenizer.vocab_size, rejected, counts)
    else:
        batch = _encode_examples(stages, content, examples, partition, rejected, counts)
    add_excerpts(rejected, data)
    batch.rejected = sorted(rejected, key=lambda record: record.line)
    batch.counts, batch.first_lines = dict(counts), counts.first_lines
    batch.unread_columns = counts.unread_columns
    return batch


def _encode_examples(
    stages: Preprocessor,
    content: ByteSearcher,
    examples: list[Example],
    partition: PartitionEncoder,
    rejected: list[Rejected],
    counts: Counts,
) -> TokenBatch:
    """Render, encode and mask the examples of a partition."""
    recipe, renderer = stages.recipe, stages.renderer
    # 1. Render, and count the backend (compiled template or Jinja) of each conversation.
    before = renderer.backend_counts()
    special_tokens = renderer.special_tokens
    is_every_line = recipe.escape_special or special_tokens.is_in(recipe.system or "")
    watched = _ALL_LINES if is_every_line else special_tokens.find_lines(content)
    texts = renderer.render(examples, rejected, counts, watched=watched)
    renders = renderer.backend_counts() - before
    counts.update({f"template.{backend}": number for backend, number in renders.items()})
    # 2. Encode.
    tokens = partition.encode(texts.texts)
    # 3. Mask. This adds the tokenizer's prefix and suffix to plain texts, so it returns tokens too.
    tokens, mask, weights = stages.masks.mask(
        texts, tokens, partition.encoder, counts, partition.samples
    )
    line_of = np.array(texts.line_of, dtype=np.int64)
    batch = TokenBatch(tokens.input_ids, tokens.offsets, mask, line_of, loss_weights=weights)
    if texts.omission_lines:
        has_omission = np.isin(line_of, texts.omission_lines)
        batch.flags = np.where(has_omission, Flag.CONTENT_NOT_SHOWN, 0).astype(np.uint8)
    if stages.observer is not None:
        stages.observer(examples, texts, partition.encoder)
    # 4. Count suspicious patterns for the summary.
    count_double_bos(batch, recipe.tokenizer, counts)
    if stages.unknown_id is not None:
        count_unknown(batch, texts.texts, recipe.tokenizer, stages.unknown_id, counts)
    elif stages.lacks_letters or (
        stages.missing_bytes and any(mark in content.data for mark in _CONTROL_MARKS)
    ):
        count_lost_bytes(batch, texts.texts, stages.missing_bytes, counts)
    if recipe.train_on != "all":
        count_untrained_ends(batch, ~np.array(texts.plain, np.bool_), stages.added, counts)
    return batch


def read_examples(
    stages: Preprocessor,
    content: ByteSearcher,
    format_name: str,
    rejected: list[Rejected],
    counts: Counts,
) -> list[Example]:
    """Return the examples of all lines.

    Args:
        stages: The stages for the recipe.
        content: The lines of the partition, as bytes that can be searched.
        format_name: The format of the records.
        rejected: Receives the records that cannot be used.
        counts: Receives the numbers of lines, lines of whitespace and records, warnings, and the
            columns that are not read.
    """
    data, quality_checks = content.data, stages.quality_checks
    searched = quality_checks.find_lines_to_search(content)
    lines, read = split_lines(data), stages.reader(format_name)
    columns = UnreadColumns(format_name, stages.reading)
    # orjson turns integers beyond 64 bits into floats, which a template would show. Such lines are
    # parsed again by Python.
    rounded = find_long_numbers(data)
    if rounded and not any(key in data for key in _KEYS_OF_OBJECTS):
        rounded = set()
    examples: list[Example] = []
    num_blank = 0
    for number, line, record, repeated_key in parse_lines(data, lines):
        if type(record) is dict:
            try:
                if repeated_key is not None:
                    raise repeated_key_error(repeated_key)
                exact = parse_exactly(line, record) if number in rounded else record
                example = read(exact, number)
                quality_checks.check(example, exact, counts, search=number in searched)
                if len(record) > 1 or example.replaced:
                    for key in columns.find_meaningful(exact, example):
                        counts.warn(f"{COLUMN_NOT_READ}{key}", number)
                for attribute, kind in _COUNTED:
                    if getattr(example, attribute):
                        counts.warn(kind, number)
                examples.append(example)
            except InvalidRecord as problem:
                rejected.append(Rejected(number, 0, problem.reason, str(problem), excerpt(line)))
            except RecursionError:
                message = "its values are nested too deeply"
                rejected.append(Rejected(number, 0, "bad_row", message, excerpt(line)))
        elif isinstance(record, Rejected):
            rejected.append(record)
        else:
            num_blank += 1
    counts.update(lines=len(lines), blank=num_blank, records=len(lines) - num_blank)
    counts.unread_columns = [*columns.found]
    return examples
