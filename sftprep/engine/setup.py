"""Before the first pass: inputs found, tokenizer and template loaded, formats detected, and what cannot work refused."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sftprep.config import BuildConfig
from sftprep.engine.recipe import Recipe
from sftprep.errors import ConfigError, TemplateError, TokenizerError
from sftprep.records import Reading, detect_format, unknown_format
from sftprep.sources.jsonl import parse_line
from sftprep.sources.partition import find_files, first_lines
from sftprep.tokenize.encoder import probe_encoder
from sftprep.tokenize.load import TokenizerSpec, load_tokenizer

_CHAT_FORMATS = ("messages", "sharegpt")
_DETECT_FROM = 100
_DEFAULT_MAX_LENGTH = 1024


@dataclass(frozen=True, slots=True)
class Setup:
    """All that is known before the first pass. formats[k] and stamps[k] are of files[k]; encoder: for the manifest."""

    files: list[str]
    formats: list[str]
    stamps: list[tuple[int, int]]
    recipe: Recipe
    encoder: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Look:
    """What a look at a file's first records tells. chat: they are conversations, which need a template."""

    file: str
    format: str
    chat: bool


def prepare_setup(config: BuildConfig) -> Setup:
    """Everything that can go wrong before work starts goes wrong here, each with its own error."""
    if not config.output.output:
        raise ConfigError("no output folder is given", remedy="give --output DIR")
    if not config.tokenize.tokenizer:
        raise ConfigError(
            "no tokenizer is given", remedy="give --tokenizer with a folder, or a name on the Hub such as Qwen/Qwen3-8B"
        )
    files = find_files(config.source.inputs)
    spec = load_tokenizer(config.tokenize.tokenizer)
    if config.tokenize.eos_token is not None:
        spec = spec.with_eos(config.tokenize.eos_token)
    source = _template_source(config, spec)
    names = config.format.renames()
    reading = Reading(tuple(names.items()), config.format.text_field, chat=source is not None)
    looks = [_looked_at(file, config, reading) for file in files]
    encoder, facts = probe_encoder(spec, config.tokenize.encoder)
    recipe = Recipe(
        tokenizer=spec,
        chat_template=source,
        date=_date(config, source),
        train_on=config.format.train_on,
        text_field=config.format.text_field,
        renames=tuple(names.items()),
        max_length=config.pack.max_length or min(spec.model_max_length or _DEFAULT_MAX_LENGTH, _DEFAULT_MAX_LENGTH),
        encoder=encoder,
        template_way=config.tokenize.template_way,
    )
    recipe.template()  # one that does not compile is refused now
    for look in looks:
        _check_together(recipe, look)
    return Setup(files, [look.format for look in looks], [stamp(file) for file in files], recipe, facts)


def stamp(file: str) -> tuple[int, int]:
    """Size and time of last change of a file: another stamp is another content."""
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def _date(config: BuildConfig, source: str | None) -> str | None:
    """The day that templates see as today; None where the template does not look, so that the day does not matter."""
    if config.tokenize.date is None and source is not None and "strftime_now" in source:
        return datetime.date.today().isoformat()
    return config.tokenize.date


def _template_source(config: BuildConfig, spec: TokenizerSpec) -> str | None:
    path = config.tokenize.chat_template
    if path is None:
        return spec.chat_template
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise TemplateError(
            f"cannot read the chat template {path}: {error.strerror}", remedy="check the path given to --chat-template"
        ) from error
    except UnicodeDecodeError as error:
        raise TemplateError(f"the chat template {path} is not UTF-8 text", remedy="give a file with a Jinja template") from error


def _looked_at(file: str, config: BuildConfig, reading: Reading) -> _Look:
    """The format asked for, or the one that the first records of a file have. Raises FormatError where none fits."""
    first = None
    for record in _first_records(file):
        name = detect_format(record, reading) if config.format.format == "auto" else config.format.format
        if name is not None:
            return _Look(file, name, chat=name in _CHAT_FORMATS or _has_turns(record, reading))
        first = first or record
    if first is not None:
        raise unknown_format(file, first, reading)
    # Nothing in it can be read; pass 1 says what and where, and an empty file adds nothing.
    name = "text" if config.format.format == "auto" else config.format.format
    return _Look(file, name, chat=False)


def _first_records(file: str) -> Iterator[dict[str, Any]]:
    for line in islice(first_lines(file), _DETECT_FROM):
        record = parse_line(line, 0)
        if isinstance(record, dict):
            yield record


def _has_turns(record: dict[str, Any], reading: Reading) -> bool:
    prompt = {target: source for source, target in reading.renames}.get("prompt", "prompt")
    return isinstance(record.get(prompt), list)


def _check_together(recipe: Recipe, look: _Look) -> None:
    """Refuse what the recipe cannot do with the records of a file."""
    where = f"{look.file} holds {look.format} records"
    if look.chat and recipe.chat_template is None:
        raise TemplateError(
            f"{where}, which are conversations, and the tokenizer {recipe.tokenizer.name} has no chat template",
            remedy="give one with --chat-template FILE, or use the tokenizer of an instruction-tuned model",
        )
    plain = not look.chat and not (look.format == "alpaca" and recipe.chat_template)
    if plain and recipe.tokenizer.eos_token is None:
        raise TokenizerError(
            f"{where}, which are plain text, and the tokenizer {recipe.tokenizer.name} has no end-of-sequence token",
            remedy="name one of its tokens with --eos-token",
        )
    if recipe.train_on == "completion" and look.format in (*_CHAT_FORMATS, "text"):
        raise ConfigError(
            f"--train-on completion: {where}, which have no completion",
            remedy="use --train-on all or assistant, or rename keys to prompt and completion with --map",
        )
    if recipe.train_on == "assistant" and look.format == "text":
        raise ConfigError(f"--train-on assistant: {where}, without turns", remedy="use --train-on all")
    if recipe.train_on == "assistant" and (look.chat or look.format == "alpaca"):
        _check_marks(recipe)


def _check_marks(recipe: Recipe) -> None:
    template = recipe.template()
    if template is not None and not template.has_generation_marks:
        raise TemplateError(
            "--train-on assistant: the chat template does not mark what the assistant says with {% generation %}",
            remedy="give a template that does with --chat-template FILE (models' training templates have the marks), "
            "or use prompt-completion records, whose completions are trained without marks",
        )
