"""The settings of a build: one frozen dataclass per concern.

Each dataclass checks its fields. The string below each field is its documentation, which the
command line shows as help.
"""

from __future__ import annotations

import dataclasses
import datetime
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from sftprep.config.data import EvalConfig, ReadConfig, SourceConfig, SourceEntry
from sftprep.config.output import OutputConfig
from sftprep.config.parsing import parse_yaml
from sftprep.config.record_format import FormatConfig
from sftprep.config.validation import (
    EncoderChoice,
    FormatName,
    OnBadRecord,
    Order,
    Overlong,
    Packing,
    SeriousOmission,
    TemplateBackend,
    TrainOn,
    TruncateSide,
    check_choice,
    check_integer,
    expand_path,
    unknown_setting,
)
from sftprep.errors import ConfigError, setting

__all__ = [
    "BuildConfig",
    "EncoderChoice",
    "EvalConfig",
    "FormatConfig",
    "FormatName",
    "OnBadRecord",
    "Order",
    "OutputConfig",
    "Overlong",
    "PackConfig",
    "Packing",
    "ReadConfig",
    "SourceConfig",
    "SourceEntry",
    "TemplateBackend",
    "TokenizeConfig",
    "TrainOn",
    "TruncateSide",
    "read_config_file",
]


@dataclass(frozen=True, slots=True)
class TokenizeConfig:
    """The tokenizer, the chat template, and their execution."""

    tokenizer: str = ""
    """Folder of a tokenizer or model, or its name on the Hub."""
    chat_template: str | None = None
    """Chat template, which replaces that of the tokenizer: a Jinja file; chatml; a tokenizer
    (folder or Hub name) whose template is copied; or one of several templates that the tokenizer
    has. Special tokens in it that the tokenizer lacks are added."""
    eos_token: str | None = None
    """Token that ends a text or a turn, which replaces that of the tokenizer."""
    date: str | None = None
    """Current date for chat templates, YYYY-MM-DD, or today. Default: 2024-07-26, the date that
    Llama 3 templates have, so that a rebuild on a later day gives the same bytes."""
    encoder: EncoderChoice = "auto"
    """auto: the first of gigatoken and fastokens that returns the same ids as tokenizers for this
    tokenizer, else tokenizers."""
    template_backend: TemplateBackend = "auto"
    """auto: chat templates are compiled where the result is exact, and run by Jinja otherwise;
    jinja: always run by Jinja."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokenizer", expand_path(self.tokenizer, setting("tokenizer")))
        if self.chat_template is not None:
            template = expand_path(self.chat_template, setting("chat_template"))
            object.__setattr__(self, "chat_template", template)
        check_choice(setting("encoder"), self.encoder, EncoderChoice)
        check_choice(setting("template_backend"), self.template_backend, TemplateBackend)
        if self.date not in (None, "today"):
            try:
                datetime.date.fromisoformat(self.date)
            except ValueError as error:
                raise ConfigError(
                    f"{setting('date')} is {self.date!r}, not a date",
                    remedy="write it as 2026-01-31, or today",
                ) from error


@dataclass(frozen=True, slots=True)
class PackConfig:
    """The packing of sequences."""

    max_length: int | None = None
    """Tokens in a pack, and the maximum length of a sequence; see --overlong. Default: the limit of
    the tokenizer, at most 1024."""
    packing: Packing = "bfd"
    """bfd: best-fit decreasing over each group; bfd_split: the same, with --overlong split;
    exact: packs filled to the last token where possible, the rest as bfd, and never more packs;
    wrapped: all sequences concatenated, and cut every max_length tokens; none: one sequence per
    row."""
    overlong: Overlong = "truncate"
    """What happens to a sequence longer than max_length. truncate: it is cut; split: it is cut into
    several; drop: it is left out; error: its record is a bad record."""
    truncate_side: TruncateSide = "right"
    """End at which a sequence is truncated: right keeps its start, left its end."""
    pack_window: int | None = None
    """Pack windows of this many sequences, such as 4096, as a stream does, instead of the whole
    corpus at once."""
    order: Order = "shuffle"
    """shuffle: packs are written in a random order that depends on the seed; keep: in the order of
    packing."""
    lanes: int = 16
    """With --pack-window: number of parts of the input, each of which has its own window."""
    seed: int = 0
    """Seed of the order of the packs."""

    def __post_init__(self) -> None:
        check_choice(setting("packing"), self.packing, Packing)
        check_choice(setting("overlong"), self.overlong, Overlong)
        check_choice(setting("truncate_side"), self.truncate_side, TruncateSide)
        if self.packing == "bfd_split" and self.overlong not in ("truncate", "split"):
            raise ConfigError(
                f"{setting('overlong', self.overlong)} has no effect with"
                f" {setting('packing', 'bfd_split')}, which splits overlong sequences",
                remedy=[f"leave out {setting('overlong')}", f"choose {setting('packing', 'bfd')}"],
            )
        if self.packing == "bfd_split":  # the name of TRL for a combination of two settings
            object.__setattr__(self, "packing", "bfd")
            object.__setattr__(self, "overlong", "split")
        if self.packing == "wrapped" and self.pack_window is not None:
            raise ConfigError(
                f"{setting('packing', 'wrapped')} packs all sequences as one, and"
                f" {setting('pack_window')} packs each window separately",
                remedy=[
                    f"leave out {setting('pack_window')}",
                    f"choose {setting('packing', 'bfd')}",
                ],
            )
        if self.packing == "wrapped" and self.overlong != "truncate":
            raise ConfigError(
                f"{setting('overlong', self.overlong)} has no effect with"
                f" {setting('packing', 'wrapped')}, which has no overlong sequences",
                remedy=[f"leave out {setting('overlong')}", f"choose {setting('packing', 'bfd')}"],
            )
        check_choice(setting("order"), self.order, Order)
        check_integer(self.pack_window, setting("pack_window"), 1, 2**31 - 1)
        if self.pack_window is not None and self.packing != "bfd":
            raise ConfigError(
                f"{setting('pack_window')} is not supported with"
                f" {setting('packing', self.packing)}",
                remedy=[
                    f"leave out {setting('pack_window')}",
                    f"choose {setting('packing', 'bfd')}",
                ],
            )
        check_integer(self.lanes, setting("lanes"), 1, 65_536)
        # A sequence needs two tokens to train one, and lengths are stored in 32 bits.
        check_integer(self.max_length, setting("max_length"), 2, 2**31 - 1)
        check_integer(self.seed, setting("seed"), 0, 2**64 - 1)


@dataclass(frozen=True, slots=True)
class BuildConfig:
    """All settings of a build.

    `BuildConfig.of(...)` takes the same settings without the nesting, by the names of their fields.
    """

    source: SourceConfig = field(default_factory=SourceConfig)
    read: ReadConfig = field(default_factory=ReadConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    format: FormatConfig = field(default_factory=FormatConfig)
    tokenize: TokenizeConfig = field(default_factory=TokenizeConfig)
    pack: PackConfig = field(default_factory=PackConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        compares = self.read.duplicates == "drop" or self.evaluation.eval_fraction
        if self.read.duplicates_by and not compares:
            raise ConfigError(
                f"{setting('duplicates_by')} is specified, but records are not compared",
                remedy=[
                    f"add {setting('duplicates', 'drop')}",
                    f"add {setting('eval_fraction', 0.05)}",
                ],
            )
        if self.output.layout == "sequences":
            self._check_planned_later()
        if self.evaluation.eval_packing is not None and self.pack.packing == "wrapped":
            raise ConfigError(
                f"{setting('packing', 'wrapped')} and"
                f" {setting('eval_packing', self.evaluation.eval_packing)} cut sequences"
                " differently",
                remedy=[
                    f"leave out {setting('eval_packing')}",
                    "build the evaluation records separately",
                ],
            )

    def _check_planned_later(self) -> None:
        """Raise ConfigError for a setting that needs the packs while the build runs."""
        unsupported = {
            setting("pack_window"): self.pack.pack_window is not None,
            setting("overlong", "error"): self.pack.overlong == "error",
        }
        for name, is_set in unsupported.items():
            if is_set:
                raise ConfigError(
                    f"{name} is not supported with {setting('layout', 'sequences')}, whose"
                    " sequences are cut and packed when they are read",
                    remedy=[f"leave out {name}", f"use {setting('layout', 'packs')}"],
                )

    @classmethod
    def of(cls, **settings: Any) -> BuildConfig:
        """Create a configuration from flat settings.

        Raises:
            ConfigError: A setting is unknown (the remedy is the most similar name) or invalid.

        Example:
            BuildConfig.of(inputs="a.jsonl", tokenizer="gpt2", output="out")
        """
        parts: dict[str, dict[str, Any]] = {part: {} for part in _PARTS}
        for name, value in settings.items():
            part = _PART_OF.get(name)
            if part is None:
                raise unknown_setting(name, sorted(_PART_OF))
            parts[part][name] = value
        return cls(**{part: kind(**parts[part]) for part, kind in _PARTS.items()})

    @property
    def rejects_suspects(self) -> bool:
        """Return whether suspect conversations are treated as bad records."""
        return self.read.quality_checks == "reject" or (
            self.read.quality_checks == "auto" and self.output.on_bad_record == "quarantine"
        )

    @property
    def rejected_omissions(self) -> tuple[str, ...]:
        """Return the kinds of content required to survive the chat template.

        A record with such an omission is a bad record.
        """
        if self.output.on_bad_record != "quarantine":
            return ()
        return tuple(kind for kind in get_args(SeriousOmission) if kind not in self.read.allow_loss)

    def entries(self) -> tuple[SourceEntry, ...]:
        """Return the sources to train on, completed with the settings of the whole build."""
        sources = self.source.sources or tuple(SourceEntry((name,)) for name in self.source.inputs)
        defaults = {
            name: getattr(self.read, name)
            for name in ("split", "config_name", "revision", "limit", "strip_nulls", "text_unit")
        }
        return tuple(
            dataclasses.replace(
                entry,
                **{name: value for name, value in defaults.items() if getattr(entry, name) is None},
            )
            for entry in sources
        )

    def eval_entries(self) -> tuple[SourceEntry, ...]:
        """Return the sources of `eval_split` or `eval_input`, or none."""
        if self.evaluation.eval_split is not None:
            return tuple(
                dataclasses.replace(
                    entry,
                    split=self.evaluation.eval_split,
                    name=f"{entry.name} ({self.evaluation.eval_split})",
                    # All evaluation records are used once.
                    weight=None,
                    repeat=1.0,
                )
                for entry in self.entries()
            )
        return dataclasses.replace(self, source=SourceConfig(self.evaluation.eval_input)).entries()

    def flat(self) -> dict[str, Any]:
        """Return the settings as one flat dictionary of JSON values."""
        return {
            name: value
            for part in _PARTS
            for name, value in dataclasses.asdict(getattr(self, part)).items()
        }


def read_config_file(path: str) -> dict[str, Any]:
    """Read a YAML file of flat settings; their names may contain - or _.

    Raises:
        ConfigError: The file cannot be read, is not YAML, is not a mapping, or has a key twice.
    """
    import yaml

    try:
        file = Path(expand_path(path, "the path of the config file"))
        content = parse_yaml(file.read_text(encoding="utf-8"), path)
    except OSError as error:
        raise ConfigError(
            f"cannot read the config file {path}: {error.strerror}",
            remedy="check its path",
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # YAML raises ValueError for a file that is not UTF-8, and for an integer of thousands of
        # digits.
        what = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(
            f"{path} is not YAML: {what}", remedy="write lines such as  max_length: 2048"
        ) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path} contains a {type(content).__name__}, not settings",
            remedy="write lines such as  max_length: 2048",
        )
    settings: dict[str, Any] = {}
    for name, value in content.items():
        known = str(name).replace("-", "_")
        if known in settings:
            raise ConfigError(f"{path} has {known!r} twice", remedy="keep one of them")
        settings[known] = value
    return settings


_PARTS: dict[str, type] = {
    "source": SourceConfig,
    "read": ReadConfig,
    "evaluation": EvalConfig,
    "format": FormatConfig,
    "tokenize": TokenizeConfig,
    "pack": PackConfig,
    "output": OutputConfig,
}
_PART_OF = {f.name: part for part, kind in _PARTS.items() for f in dataclasses.fields(kind)}
