"""Setup of a build: inputs, tokenizer, template, and detected formats.

Every combination that cannot work is rejected here, before the first pass.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from sftprep.config.build import BuildConfig, FormatConfig, SourceEntry
from sftprep.config.user_functions import resolve_function
from sftprep.core.notices import Notice
from sftprep.errors import ConfigError, setting, source_name
from sftprep.pipeline.passes.overlong import LengthLimit
from sftprep.pipeline.prepare.chat_templates import (
    read_templates,
    template_date,
    template_source,
)
from sftprep.pipeline.prepare.inputs import Input, find_inputs
from sftprep.pipeline.prepare.manifest_fields import manifest_facts, manifest_settings
from sftprep.recipe import Recipe
from sftprep.records.checks.unread_columns import has_counted_name
from sftprep.records.formats import FORMATS, detect_format, keys_read
from sftprep.records.inspection.compared_keys import check_compared_keys
from sftprep.records.inspection.source_reading import SourceReading, check_answers, inspect_records
from sftprep.records.inspection.suggestions import unknown_format
from sftprep.records.options import RecordOptions, rename_keys
from sftprep.records.pretokenized import MASKS
from sftprep.records.transform import transformed_records
from sftprep.render.compatibility import (
    DetectedFormat,
    check_compatible,
    trained_part,
    uses_template,
)
from sftprep.shards.manifest_size import check_manifest_size
from sftprep.sources.partition import Source, first_lines, table_columns
from sftprep.sources.peek import RECORDS_TO_INSPECT, first_records
from sftprep.tokenize.loading.load import TokenizerSpec, load_tokenizer
from sftprep.tokenize.select import probe_encoder

_log = logging.getLogger(__name__)

_DEFAULT_MAX_LENGTH = 1024
_MOST_LINES = 1_000_000
"""The most lines that are read until there is a record, from which the format is detected."""
_INSPECTED_RECORDS = 20
"""Records at the start of an input that are read to describe how it is read."""


@dataclass(frozen=True, slots=True)
class Setup:
    """Everything known before the first pass.

    Attributes:
        inputs: The inputs, training inputs first.
        entries: The sources to which the inputs belong.
        readings: How the records of each input are read.
        recipe_of: For each input, the index of its recipe in `recipes`.
        recipes: The distinct recipes. They differ only in how records are read.
        limit: The limit of the lengths of sequences.
        encoder: The description of the encoder for the manifest.
    """

    inputs: list[Input]
    entries: list[SourceEntry]
    readings: list[SourceReading]
    recipe_of: list[int]
    recipes: list[Recipe]
    limit: LengthLimit
    encoder: dict[str, Any]

    @property
    def recipe(self) -> Recipe:
        """The recipe of the first input; all recipes share its tokenizer and template."""
        return self.recipes[0]

    @property
    def formats(self) -> list[str]:
        """The format of each input."""
        return [reading.format for reading in self.readings]

    @property
    def files(self) -> list[str]:
        """The file of each input; for data in memory, its name."""
        return [each.source.file for each in self.inputs]

    @property
    def names(self) -> list[str]:
        """The name of each input, as errors and the manifest show it."""
        return [each.source.name for each in self.inputs]


def prepare_setup(
    config: BuildConfig, data: Sequence[Source] = (), eval_data: Sequence[Source] = ()
) -> Setup:
    """Prepare a build; raise a specific error if it cannot work.

    Args:
        config: The settings of the build.
        data: Training data in memory, used instead of the inputs in the settings.
        eval_data: Evaluation data in memory, likewise.
    """
    _check_required(config, has_data=bool(data or eval_data), needs_output=True)
    return prepare_reading(config, data, eval_data)


def prepare_reading(
    config: BuildConfig,
    data: Sequence[Source] = (),
    eval_data: Sequence[Source] = (),
    *,
    skips_columns: bool = True,
) -> Setup:
    """Prepare the first pass of a build, as `prepare_setup` does, without an output folder.

    Args:
        config: The settings of the build.
        data: Training data in memory, used instead of the inputs in the settings.
        eval_data: Evaluation data in memory, likewise.
        skips_columns: Whether pass 1 skips the columns of tables that no format reads.
    """
    _check_required(config, has_data=bool(data or eval_data), needs_output=False)
    inputs, entries = find_inputs(config, data, eval_data)
    _check_has_weights(config, entries)
    settings = manifest_settings(config, [each.source.name for each in inputs])
    # Checked before the inputs are opened, which takes long if there are many of them.
    check_manifest_size({"config": settings})
    recipe_numbers: dict[FormatConfig, int] = {}
    recipes: list[Recipe] = []
    narrowed_inputs: list[Input] = []
    readings: list[SourceReading] = []
    recipe_of: list[int] = []
    encoder: dict[str, Any] = {}
    for each in inputs:
        # An entry of a mixture may override how its records are read.
        entry_format = entries[each.entry].format_config(config.format)
        entry_config = dataclasses.replace(config, format=entry_format)
        if entry_format not in recipe_numbers:
            recipe_numbers[entry_format] = len(recipes)
            recipe, encoder = prepare_recipe(entry_config)
            if not recipes:
                check_manifest_size({"config": settings, **manifest_facts(recipe, encoder)})
            recipes.append(recipe)
        number = recipe_numbers[entry_format]
        recipe_of.append(number)
        reading = inspect_source(
            each.source.name,
            first_lines(each.source),
            entry_config,
            recipes[number],
            is_table=each.source.is_table and not each.source.strip_nulls,
        )
        source = each.source
        if skips_columns and recipes[number].record_functions() is None:
            source, skipped = _skip_columns(source, recipes[number], config)
            reading = reading.add_columns(skipped)
        readings.append(reading)
        narrowed_inputs.append(dataclasses.replace(each, source=source))
    names = [each.source.name for each in inputs]
    log_notices(names, readings)
    num_training = sum(not each.evaluation for each in inputs)
    check_compared_keys(config.read.duplicates_by, names, readings[:num_training])
    limit = length_limit(config, recipes[0].tokenizer)
    return Setup(narrowed_inputs, entries, readings, recipe_of, recipes, limit, encoder)


def _skip_columns(source: Source, recipe: Recipe, config: BuildConfig) -> tuple[Source, list[str]]:
    """Return a source of which only some columns are read, and the others that have content.

    Of a table, only the columns that formats know are read, and those that are counted if they have
    a value. Other columns may be large, such as embeddings.
    """
    columns = table_columns(source)
    if columns is None:
        return source, []
    keys = keys_read(recipe.record_options()) | {*config.read.duplicates_by}
    keys |= {name for name in columns if has_counted_name(name)}
    skipped = [name for name, may_have_content in columns.items() if may_have_content]
    return dataclasses.replace(source, columns=keys), [name for name in skipped if name not in keys]


def prepare_recipe(config: BuildConfig) -> tuple[Recipe, dict[str, Any]]:
    """Return the recipe for the settings, and facts of its encoder for the manifest.

    Raises:
        TokenizerError: The tokenizer cannot be loaded.
        TemplateError: The chat template cannot be read or does not compile.
        ConfigError: No tokenizer is specified.
    """
    _check_has_tokenizer(config)
    templates = read_templates(config, load_tokenizer(config.tokenize.tokenizer))
    spec, tool_template = templates.tokenizer, templates.with_tools
    encoder, encoder_facts = probe_encoder(spec, config.tokenize.encoder)
    recipe = Recipe(
        tokenizer=spec,
        chat_template=templates.default,
        date=template_date(config, f"{templates.default}{tool_template}"),
        train_on=config.format.train_on,
        text_field=config.format.text_field,
        renames=tuple(config.format.renames().items()),
        encoder=encoder,
        template_backend=config.tokenize.template_backend,
        reasoning=config.format.reasoning,
        train_empty_thinking=config.format.train_empty_thinking == "yes",
        escape_special=config.format.escape_special,
        as_chat=config.format.as_chat,
        drop_images=config.format.images == "drop",
        formatting_func=resolve_function(config.format.formatting_func),
        transform=resolve_function(config.format.transform),
        transform_id=config.format.transform_id,
        reject_suspects=config.rejects_suspects,
        rejected_losses=config.rejected_omissions,
        tool_template=tool_template,
        train_roles=config.format.train_roles,
        train_end=config.format.train_end,
        system=config.format.system,
        template_kwargs=config.format.chat_template_kwargs,
    )
    return recipe, encoder_facts


def length_limit(config: BuildConfig, spec: TokenizerSpec) -> LengthLimit:
    """Return the limit of the lengths of sequences, from the settings."""
    pack, model_limit = config.pack, spec.model_max_length
    default = min(model_limit or _DEFAULT_MAX_LENGTH, _DEFAULT_MAX_LENGTH)
    return LengthLimit(
        max_length=pack.max_length or default,
        # Wrapped packing cuts the stream of all tokens, so that no sequence is too long for it.
        overlong="keep" if pack.packing == "wrapped" else pack.overlong,
        truncate_side=pack.truncate_side,
        model_limit=None if model_limit is None else min(model_limit, 2**31 - 1),
    )


def inspect_source(
    name: str,
    lines: Iterable[bytes],
    config: BuildConfig,
    recipe: Recipe,
    *,
    is_table: bool = False,
) -> SourceReading:
    """Return how a source is read, and check that the recipe supports it.

    Args:
        name: The name of the source, for errors.
        lines: Its lines, of which the first ones are read.
        config: The settings of the build.
        recipe: The recipe for the source.
        is_table: Whether its records have the types of a table.

    Raises:
        FormatError: No format fits the records, or no record has an answer.
        TemplateError: The records need a chat template that is missing or cannot give the masks.
        TokenizerError: The records need an end-of-sequence token, and the tokenizer has none.
        ConfigError: A setting is not supported for records of this format.
    """
    functions = recipe.record_functions()
    # The first lines may be malformed, and a transform may use none of the first records.
    records = first_records(lines, _MOST_LINES)
    if functions is not None:
        records = transformed_records(records, functions)
    records = islice(records, RECORDS_TO_INSPECT)
    keys: frozenset[str] = frozenset()
    if config.read.duplicates_by:
        sample = list(records)
        keys, records = frozenset().union(*sample), iter(sample)
    first = list(islice(records, _INSPECTED_RECORDS))
    options = recipe.record_options()
    detected = _detect(name, chain(first, records), config, options)
    check_compatible(recipe, detected)
    if config.read.quality_checks != "keep":
        check_answers(name, first, detected.format, options)
    reading = inspect_records(first, detected.format, options, is_table=is_table)
    return dataclasses.replace(
        reading,
        is_detected=detected.is_certain,
        keys=keys,
        trained=reading.trained or trained_part(recipe, detected),
        template=template_source(config, recipe.tool_template)
        if uses_template(recipe, detected)
        else "",
    )


def log_notices(names: Sequence[str], readings: Sequence[SourceReading]) -> None:
    """Log the notices of sources, those of several sources once."""
    sources: dict[Notice, list[str]] = {}
    for name, reading in zip(names, readings, strict=True):
        for notice in reading.notices:
            sources.setdefault(notice, []).append(name)
    for notice, where in sources.items():
        more = f" and {len(where) - 1:,} more" if len(where) > 1 else ""
        notice.log(f"{source_name(where[0])}{more}: ")


_TOKENIZER_REMEDY = "specify the tokenizer as a folder or a name on the Hub"


def _check_required(config: BuildConfig, *, has_data: bool, needs_output: bool) -> None:
    """Raise ConfigError with everything that is missing from the settings of a build."""
    source, remedies = config.source, {}
    if not (has_data or source.inputs or source.sources):
        remedies["input"] = "name a .jsonl file, a glob or a folder: sftprep build data.jsonl ..."
    if not config.tokenize.tokenizer:
        remedies["tokenizer"] = (
            f"{_TOKENIZER_REMEDY}, for example {setting('tokenizer', 'Qwen/Qwen3-8B')}"
        )
    if needs_output and not config.output.output:
        remedies["output folder"] = f"specify the folder with {setting('output', 'DIR')}"
    if remedies:
        verb = "is" if len(remedies) == 1 else "are"
        what = f"no {' and no '.join(remedies)} {verb} specified"
        raise ConfigError(what, remedy="; ".join(remedies.values()))


def _check_has_weights(config: BuildConfig, entries: Sequence[SourceEntry]) -> None:
    mix_by = config.read.mix_by
    if mix_by != "records" and all(entry.weight is None for entry in entries):
        raise ConfigError(
            f"{setting('mix_by', mix_by)} is specified, but no source has a weight",
            remedy=[
                "specify the sources with their weights in a config file",
                f"leave out {setting('mix_by')}",
            ],
        )


def _check_has_tokenizer(config: BuildConfig) -> None:
    if not config.tokenize.tokenizer:
        remedy = f"{_TOKENIZER_REMEDY}, for example {setting('tokenizer', 'Qwen/Qwen3-8B')}"
        raise ConfigError("no tokenizer is specified", remedy=remedy)


def _detect(
    file: str, records: Iterable[dict[str, Any]], config: BuildConfig, reading: RecordOptions
) -> DetectedFormat:
    """Return the format in the settings, or detect it from the first records."""
    first = None
    for record in records:
        name: str | None = config.format.format
        if name == "auto":
            name = detect_format(record, reading)
        if name is None:
            first = first or record
            continue
        sources = [source for source, _ in reading.renames]
        missing = ", ".join(repr(key) for key in sources if key not in record)
        if missing:
            _log.warning("map: the first record of %s has no key %s", file, missing)
        replaced: dict[str, Any] = {}
        rename_keys(dict(record), reading.renames, replaced)
        names = ", ".join(repr(key) for key, value in replaced.items() if value)
        if names:
            _log.warning("map: %s of the first record of %s is replaced and lost", names, file)
        masks = frozenset(MASKS & record.keys()) if name == "tokens" else frozenset()
        is_chat = FORMATS[name].kind == "conversation" or _has_turns(record, name, reading)
        return DetectedFormat(file, name, is_chat=is_chat, masks=masks)
    if first is not None:
        raise unknown_format(file, first, reading)
    # No record can be parsed, or a function dropped them all. Pass 1 reports each of them with its
    # line, and an empty file adds nothing.
    if config.format.format == "auto":
        return DetectedFormat(file, "text", is_chat=False, is_certain=False)
    return DetectedFormat(file, config.format.format, is_chat=False)


def _has_turns(record: dict[str, Any], name: str, reading: RecordOptions) -> bool:
    """Return whether a record is a request and an answer in the form of messages."""
    kind = FORMATS[name]
    if kind.kind not in ("prompt", "pair"):
        return False
    sources = {target: source for source, target in reading.renames}
    return (reading.as_chat and kind.kind == "prompt") or any(
        isinstance(record.get(sources.get(key, key)), list) for key in kind.keys
    )
