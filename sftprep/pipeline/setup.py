"""Before the first pass: inputs found, tokenizer and template loaded, formats detected, and what
cannot work refused."""

from __future__ import annotations

import dataclasses
import datetime
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from sftprep.chat_template.assistant_spans import Unproven
from sftprep.chat_template.template import ChatTemplate
from sftprep.config.build import BuildConfig, FormatConfig, SourceEntry
from sftprep.errors import ConfigError, TemplateError, TokenizerError
from sftprep.pipeline.inputs import Input, find_inputs
from sftprep.recipe import Recipe
from sftprep.records.formats import detect_format, keys_read, unknown_format
from sftprep.records.options import RecordOptions
from sftprep.records.pretokenized import MASKS
from sftprep.render.renderer import Renderer
from sftprep.shards.manifest_size import check_manifest_size, expected_input
from sftprep.sources.partition import Source, first_lines
from sftprep.sources.peek import first_records
from sftprep.tokenize.loading.load import TokenizerSpec, load_tokenizer
from sftprep.tokenize.select import probe_encoder

_log = logging.getLogger(__name__)

_CHAT_FORMATS = ("messages", "sharegpt")
_DEFAULT_MAX_LENGTH = 1024


@dataclass(frozen=True, slots=True)
class Setup:
    """All that is known before the first pass.

    formats[k] and recipe_of[k] are of inputs[k]: its format, and the number of its recipe in
    `recipes`, which differ only in how records are read; encoder: for the manifest.
    """

    inputs: list[Input]
    entries: list[SourceEntry]
    formats: list[str]
    recipe_of: list[int]
    recipes: list[Recipe]
    encoder: dict[str, Any]

    @property
    def recipe(self) -> Recipe:
        """The recipe of the first input: its tokenizer, template and max_length are those of
        all."""
        return self.recipes[0]

    @property
    def files(self) -> list[str]:
        """The files of the inputs; the names of those in memory."""
        return [each.source.file for each in self.inputs]

    @property
    def names(self) -> list[str]:
        """What to call the inputs."""
        return [each.source.name for each in self.inputs]


@dataclass(frozen=True, slots=True)
class _Look:
    """What a look at a file's first records tells. chat: they are conversations, which need a
    template; masks: keys of a record of tokens that say what is trained."""

    file: str
    format: str
    chat: bool
    masks: frozenset[str] = frozenset()


def prepare_setup(
    config: BuildConfig, data: Sequence[Source] = (), eval_data: Sequence[Source] = ()
) -> Setup:
    """Everything that can go wrong before work starts goes wrong here, each with its own error.

    data, eval_data: sources in memory instead of those that the config names.
    """
    if not config.output.output:
        raise ConfigError("no output folder is given", remedy="give --output DIR")
    _require_tokenizer(config)
    inputs, entries = find_inputs(config, data, eval_data)
    check_size = partial(_check_manifest_size, config, inputs, entries)
    # Before each input is looked at, which takes long if there are many.
    check_size({})
    recipes: dict[FormatConfig, int] = {}
    made: list[Recipe] = []
    narrowed: list[Input] = []
    formats: list[str] = []
    recipe_of: list[int] = []
    facts: dict[str, Any] = {}
    for each in inputs:
        own = dataclasses.replace(config, format=entries[each.entry].format_config(config.format))
        if own.format not in recipes:
            recipes[own.format] = len(made)
            recipe, facts = prepare_recipe(own)
            if not made:
                check_size(manifest_facts(recipe, facts))
            made.append(recipe)
        recipe_of.append(recipes[own.format])
        formats.append(
            format_of(
                each.source.name, first_records(first_lines(each.source)), own, made[recipe_of[-1]]
            )
        )
        columns = keys_read(made[recipe_of[-1]].reading())
        narrowed.append(
            dataclasses.replace(each, source=dataclasses.replace(each.source, columns=columns))
        )
    return Setup(narrowed, entries, formats, recipe_of, made, facts)


def prepare_recipe(config: BuildConfig) -> tuple[Recipe, dict[str, Any]]:
    """The recipe that the settings ask for, and facts on its encoder. Raises TokenizerError,
    TemplateError, ConfigError."""
    _require_tokenizer(config)
    spec = load_tokenizer(config.tokenize.tokenizer)
    if config.tokenize.eos_token is not None:
        spec = spec.with_eos(config.tokenize.eos_token)
    source = _template_source(config, spec)
    encoder, facts = probe_encoder(spec, config.tokenize.encoder)
    recipe = Recipe(
        tokenizer=spec,
        chat_template=source,
        date=_date(config, source),
        train_on=config.format.train_on,
        text_field=config.format.text_field,
        renames=tuple(config.format.renames().items()),
        max_length=config.pack.max_length
        or min(spec.model_max_length or _DEFAULT_MAX_LENGTH, _DEFAULT_MAX_LENGTH),
        encoder=encoder,
        template_backend=config.tokenize.template_backend,
        overlong="keep" if config.pack.packing == "wrapped" else config.pack.overlong,
        truncate_side=config.pack.truncate_side,
        expand_turns=config.format.expand_turns,
        escape_special=config.format.escape_special,
        formatting_func=config.format.formatting_func,
        reject_suspects=config.rejects_suspects,
    )
    return recipe, facts


def format_of(
    name: str, records: Iterator[dict[str, Any]], config: BuildConfig, recipe: Recipe
) -> str:
    """The format of a source, from its first records; what the recipe cannot do with it is refused.

    Raises FormatError, TemplateError, TokenizerError, ConfigError.
    """
    look = _looked_at(name, records, config, recipe.reading())
    _check_together(recipe, look)
    return look.format


def manifest_settings(config: BuildConfig, names: Sequence[str]) -> dict[str, Any]:
    """Return the settings that the manifest of a build holds. names: of its inputs."""
    # What does not change a byte of the shards stays out: the same build elsewhere has the same
    # manifest.
    elsewhere = ("output", "workers", "overwrite", "keep_spill", "on_bad_record", "max_rejected")
    settings: dict[str, Any] = {
        name: value for name, value in config.flat().items() if name not in elsewhere
    }
    return {
        **settings,
        "map": list(config.format.map),
        "inputs": list(config.source.inputs) or list(names),
    }


def manifest_facts(recipe: Recipe, encoder: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a manifest that are known from the recipe and the facts on its
    encoder."""
    spec = recipe.tokenizer
    return {
        "tokenizer": {
            "name": spec.name,
            "fingerprint": spec.fingerprint,
            "vocab_size": spec.vocab_size,
            "eos_token_id": spec.eos_token_id,
            "pad_token_id": spec.pad_token_id,
        },
        "chat_template": recipe.chat_template,
        "encoder": encoder,
    }


def _check_manifest_size(
    config: BuildConfig, inputs: list[Input], entries: list[SourceEntry], facts: dict[str, Any]
) -> None:
    """Raises ConfigError where the manifest of the build or of its evaluation would be too large.

    facts: fields of the manifest that are known, but for its settings and inputs.
    """
    reasons: list[str] = []
    if config.evaluation.eval_fraction:
        reasons += ["left_out.in_training", "tokens_left_out.in_training"]
    if any(entry.weight is not None for entry in entries):
        reasons += ["left_out.not_sampled", "tokens_left_out.not_sampled"]
    if any(entry.repeat != 1 for entry in entries):
        reasons += ["extra.repeated", "tokens_extra.repeated"]
    for evaluation in (False, True):
        names: dict[tuple[str, int | None], list[str]] = {}
        for each in inputs:
            if each.evaluation == evaluation:
                kind = (entries[each.entry].name, each.source.limit)
                names.setdefault(kind, []).append(each.source.name)
        paths = [path for own in names.values() for path in own]
        check_manifest_size(
            {"config": manifest_settings(config, paths), **facts},
            [(expected_input(*kind, reasons), own) for kind, own in names.items()],
        )


def _require_tokenizer(config: BuildConfig) -> None:
    if not config.tokenize.tokenizer:
        raise ConfigError(
            "no tokenizer is given",
            remedy="give --tokenizer with a folder, or a name on the Hub such as Qwen/Qwen3-8B",
        )


def _date(config: BuildConfig, source: str | None) -> str | None:
    """The day that templates see as today; None where the template does not look, so that the day
    does not matter."""
    if config.tokenize.date is None and source is not None and "strftime_now" in source:
        return datetime.date.today().isoformat()
    return config.tokenize.date


def _template_source(config: BuildConfig, spec: TokenizerSpec) -> str | None:
    path = config.tokenize.chat_template
    if path is None:
        return spec.chat_template
    try:
        source = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise TemplateError(
            f"cannot read the chat template {path}: {error.strerror}",
            remedy="check the path given to --chat-template",
        ) from error
    except UnicodeDecodeError as error:
        raise TemplateError(
            f"the chat template {path} is not UTF-8 text",
            remedy="give a file with a Jinja template",
        ) from error
    _refuse_broken(source)
    return source


@lru_cache(maxsize=16)
def _refuse_broken(source: str) -> None:
    """Raises TemplateError where a chat template does not compile."""
    ChatTemplate(source, variables={}, way="jinja")  # pieces are compiled where it is used


def _looked_at(
    file: str, records: Iterator[dict[str, Any]], config: BuildConfig, reading: RecordOptions
) -> _Look:
    """The format asked for, or the one that the first records of a file have. Raises FormatError
    where none fits."""
    first = None
    for record in records:
        name = (
            detect_format(record, reading)
            if config.format.format == "auto"
            else config.format.format
        )
        if name is not None:
            absent = [source for source, _ in reading.renames if source not in record]
            if absent:
                _log.warning(
                    "--map: the first record of %s has no key %s",
                    file,
                    ", ".join(map(repr, absent)),
                )
            masks = frozenset(MASKS & record.keys()) if name == "tokens" else frozenset()
            return _Look(
                file, name, chat=name in _CHAT_FORMATS or _has_turns(record, reading), masks=masks
            )
        first = first or record
    if first is not None:
        raise unknown_format(file, first, reading)
    # Nothing in it can be read; pass 1 says what and where, and an empty file adds nothing.
    name = "text" if config.format.format == "auto" else config.format.format
    return _Look(file, name, chat=False)


def _has_turns(record: dict[str, Any], reading: RecordOptions) -> bool:
    prompt = {target: source for source, target in reading.renames}.get("prompt", "prompt")
    return isinstance(record.get(prompt), list)


def _check_together(recipe: Recipe, look: _Look) -> None:
    """Refuse what the recipe cannot do with the records of a file."""
    where = f"{look.file} holds {look.format} records"
    if look.chat and recipe.chat_template is None:
        raise TemplateError(
            f"{where}, which are conversations, and the tokenizer {recipe.tokenizer.name} has no"
            " chat template",
            remedy=(
                "give one with --chat-template FILE, or use the tokenizer of an instruction-tuned"
                " model"
            ),
        )
    templated = recipe.chat_template is not None and (look.chat or look.format == "alpaca")
    if templated:
        _refuse_broken(recipe.chat_template or "")
    if look.format != "tokens" and not templated and recipe.tokenizer.eos_token is None:
        raise TokenizerError(
            f"{where}, which are plain text, and the tokenizer {recipe.tokenizer.name} has no"
            " end-of-sequence token",
            remedy="name one of its tokens with --eos-token",
        )
    if (
        recipe.train_on == "completion"
        and look.format in (*_CHAT_FORMATS, "text")
        and not (look.chat and recipe.expand_turns)
    ):
        raise ConfigError(
            f"--train-on completion: {where}, which have no completion",
            remedy=(
                "use --train-on all or assistant, or rename keys to prompt and completion with"
                " --map"
            ),
        )
    by_turn = recipe.train_on in ("assistant", "last-assistant")
    if (by_turn or recipe.expand_turns) and look.format == "text":
        asked = f"--train-on {recipe.train_on}" if by_turn else "--expand-turns"
        raise ConfigError(f"{asked}: {where}, without turns", remedy="use --train-on all")
    if look.format == "tokens":
        _check_tokens(recipe, look)
    if by_turn and templated:
        _check_masks(recipe)


def _check_tokens(recipe: Recipe, look: _Look) -> None:
    """Tokens say themselves what is trained; refuse what is asked of them and they do not say."""
    said = recipe.train_on in ("auto", "all") or look.masks & _SAYING.get(
        recipe.train_on, frozenset()
    )
    if recipe.expand_turns or not said:
        asked = "--expand-turns" if recipe.expand_turns else f"--train-on {recipe.train_on}"
        raise ConfigError(
            f"{asked}: {look.file} holds tokens, which do not tell what that is",
            remedy=(
                'leave it out; what is trained of tokens is said by their "labels",'
                ' "completion_mask" or "assistant_masks"'
            ),
        )


_SAYING = {
    "completion": frozenset({"labels", "completion_mask"}),
    "assistant": frozenset({"labels", "assistant_masks"}),
}
"""What of a record of tokens tells what a --train-on asks for."""


def _check_masks(recipe: Recipe) -> None:
    try:
        Renderer(recipe).check_masks()
    except Unproven as error:
        raise TemplateError(
            f"--train-on {recipe.train_on}: the chat template does not mark what the assistant says"
            f" with {{% generation %}}, and {error.message}",
            remedy=(
                "give a template that does with --chat-template FILE (models' training templates"
                " have the marks), or use prompt-completion records or --expand-turns, whose"
                " completions are trained without marks"
            ),
        ) from error
