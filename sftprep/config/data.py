"""The input settings: sources, their reading, and the evaluation hold-out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from sftprep.config.record_format import FormatConfig
from sftprep.config.user_functions import to_function_setting
from sftprep.config.validation import (
    Duplicates,
    EvalPacking,
    FormatName,
    Images,
    MixBy,
    QualityChecks,
    SeriousOmission,
    TextUnit,
    TrainEnd,
    TrainOn,
    TrainRole,
    check_choice,
    check_integer,
    check_limit,
    check_message,
    check_number,
    check_strings,
    check_type,
    expand_path,
    split_list,
    template_variables,
    to_number,
    to_strings,
    unknown_setting,
)
from sftprep.errors import ConfigError, setting


@dataclass(frozen=True, slots=True)
class SourceEntry:
    """One source of a mixture, an item of `sources:` in a config file.

    A setting that is None has the value of the whole build. The records of a source are selected
    in this order: the first `limit` are read; the evaluation records are removed; each of the rest
    is used `repeat` times.

    Attributes:
        weight: The share of the source in the mixture, relative to the other weights; `mix_by` says
            of what. The source with the least for its weight is used completely, the others in
            part.
        repeat: How often each record is used; for the fraction of it, a share of the records that
            is chosen by a seeded hash is used once more.
    """

    inputs: tuple[str, ...]
    name: str = ""
    weight: float | None = None
    repeat: float = 1.0
    limit: int | None = None
    split: str | None = None
    config_name: str | None = None
    revision: str | None = None
    strip_nulls: bool | None = None
    text_unit: TextUnit | None = None
    format: FormatName | None = None
    text_field: str | None = None
    map: tuple[str, ...] | None = None
    train_on: TrainOn | None = None
    train_roles: tuple[TrainRole, ...] | None = None
    train_end: TrainEnd | None = None
    system: str | None = None
    chat_template_kwargs: str | None = None
    as_chat: bool | None = None
    images: Images | None = None
    formatting_func: str | None = None
    transform: str | None = None
    transform_id: str | None = None

    def __post_init__(self) -> None:
        for key in ("formatting_func", "transform"):
            function = to_function_setting(getattr(self, key), f"the {key} of a source")
            object.__setattr__(self, key, function)
        inputs = check_strings(self.inputs, "the path of a source")
        object.__setattr__(self, "inputs", _expand_paths(inputs))
        object.__setattr__(self, "name", str(self.name or ", ".join(self.inputs)))
        if self.map is not None:
            object.__setattr__(self, "map", check_strings(self.map, f"the map of {self.name}"))
        for key in ("weight", "repeat"):
            object.__setattr__(self, key, to_number(getattr(self, key)))
        if self.train_roles is not None:
            roles = check_strings(self.train_roles, f"the train_roles of {self.name}")
            object.__setattr__(self, "train_roles", split_list(roles))
        for key in ("split", "config_name", "revision", "text_field", "transform_id"):
            check_type(getattr(self, key), f"the {key} of {self.name}", str, "a string")
        if self.text_unit is not None:
            check_choice(f"the text_unit of {self.name}", self.text_unit, TextUnit)
        if self.system != "":  # no system message, whatever that of the whole build is
            check_message(self.system, f"the system of {self.name}")
        variables = template_variables(
            self.chat_template_kwargs, f"the chat_template_kwargs of {self.name}"
        )
        object.__setattr__(self, "chat_template_kwargs", variables)
        check_type(self.strip_nulls, f"the strip_nulls of {self.name}", bool, "true or false")
        if self.weight is not None:
            check_number(self.weight, f"the weight of {self.name}", 1e-6, 1e6)
        check_number(self.repeat, f"the repeat of {self.name}", 1e-6, 1000)
        check_limit(self.limit, f"the limit of {self.name}")

    @classmethod
    def of(cls, item: object) -> SourceEntry:
        """Create an entry from an item of a config file.

        Args:
            item: A path, or a mapping with the key `path` or `inputs` and further settings.

        Raises:
            ConfigError: The item is something else, or has an unknown or invalid setting.
        """
        if isinstance(item, (SourceEntry, str)):
            return item if isinstance(item, SourceEntry) else cls((item,))
        if not isinstance(item, dict):
            raise ConfigError(
                f"a source is {item!r}",
                remedy="write a path, or settings such as  - path: chats.jsonl",
            )
        values = {str(name).replace("-", "_"): value for name, value in item.items()}
        if "path" in values:
            values["inputs"] = values.pop("path")
        known = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise unknown_setting(name, ["path", *known], "of a source")
        if not values.get("inputs"):
            raise ConfigError(f"a source names no input: {item!r}", remedy="add a path:")
        return cls(**values)

    def format_config(self, whole: FormatConfig) -> FormatConfig:
        """Return how the records of this source are read.

        Args:
            whole: The settings of the whole build.

        Raises:
            ConfigError: The combination of settings is invalid.
        """
        names = ("format", "text_field", "map", "as_chat", "images")
        rendered = ("system", "chat_template_kwargs")
        trained = ("train_on", "train_roles", "train_end")
        functions = ("formatting_func", "transform", "transform_id")
        settings = {name: getattr(self, name) for name in (*names, *rendered, *trained, *functions)}
        settings = {name: value for name, value in settings.items() if value is not None}
        if self.system == "":
            settings["system"] = None
        return dataclasses.replace(whole, **settings) if settings else whole


@dataclass(frozen=True, slots=True)
class SourceConfig:
    """The sources of the records."""

    inputs: tuple[str, ...] = ()
    """Files, globs, folders, or datasets on the Hub (org/name); several are read in their order."""
    sources: tuple[SourceEntry, ...] = ()
    """Instead of inputs: the sources of a mixture, each with its own settings."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", _expand_paths(to_strings(self.inputs)))
        if not isinstance(self.sources, (list, tuple)):
            raise ConfigError(
                f"sources is {self.sources!r}",
                remedy="write a list of sources: - path: chats.jsonl",
            )
        object.__setattr__(self, "sources", tuple(SourceEntry.of(item) for item in self.sources))
        # Not references: inputs are positional on the command line, and sources are not a flag.
        if self.inputs and self.sources:
            raise ConfigError(
                "inputs and sources are both given", remedy="name all inputs in one of the two"
            )
        object.__setattr__(self, "sources", _make_names_unique(self.sources))
        weighted = [entry for entry in self.sources if entry.weight is not None]
        if weighted and len(weighted) < len(self.sources):
            without = next(entry.name for entry in self.sources if entry.weight is None)
            raise ConfigError(
                f"the source {without} has no weight, and others have one",
                remedy="specify a weight for every source, or for none",
            )


def _expand_paths(inputs: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(expand_path(name, "an input") for name in inputs)


def _make_names_unique(entries: tuple[SourceEntry, ...]) -> tuple[SourceEntry, ...]:
    """Return the sources with equal names numbered, as in the manifest: a, a (2)."""
    used: set[str] = set()
    original = {entry.name for entry in entries}
    renamed = []
    for entry in entries:
        name, number = entry.name, 1
        # A number must not lead to the original name of another source.
        while name in used or (number > 1 and name in original):
            number += 1
            name = f"{entry.name} ({number})"
        used.add(name)
        renamed.append(entry if number == 1 else dataclasses.replace(entry, name=name))
    return tuple(renamed)


@dataclass(frozen=True, slots=True)
class ReadConfig:
    """The part of the sources to read.

    A source of a mixture may have its own values.
    """

    split: str | None = None
    """Split of a dataset that has several. Default: train."""
    config_name: str | None = None
    """Configuration (subset) of a dataset on the Hub."""
    revision: str | None = None
    """Branch, tag or commit of a dataset on the Hub."""
    limit: int | None = None
    """Maximum number of records to read from each source."""
    text_unit: TextUnit = "line"
    """With --format text, what a record of a plain text file (.txt, .text, .md) is: a line, or the
    whole file."""
    strip_nulls: bool = False
    """Remove keys whose value is null, at every depth; a row of a table has null for each key that
    only other rows have."""

    mix_by: MixBy = "records"
    """What the weights of the sources of a mixture count: records, tokens, or trained tokens."""
    quality_checks: QualityChecks = "auto"
    """What happens to conversations that are readable but look wrong (role order, empty turns, no
    assistant turn, a tool's answer without a call, special tokens or image placeholders in the
    text). reject: treat them as bad records; keep: train on them, as TRL does; auto: reject with
    --on-bad-record quarantine, keep otherwise."""
    allow_loss: tuple[SeriousOmission, ...] = ()
    """With --on-bad-record quarantine, a record is rejected if the chat template drops a message
    (message_not_shown), a tool call (call_not_shown), an argument of a call (argument_not_shown),
    text alongside a call (text_with_call_not_shown), or reasoning of the last turn
    (reasoning_not_shown). The kinds listed here are only counted."""
    duplicates: Duplicates = "keep"
    """drop: of records that are equal, ignoring whitespace, use only the first one. Only what their
    format reads is compared, so their ids and dates may differ."""
    duplicates_by: tuple[str, ...] = ()
    """Keys by which records are compared instead, for --duplicates and --eval-fraction: url or
    a,b. They are keys of the records that --transform returns."""

    def __post_init__(self) -> None:
        check_limit(self.limit, setting("limit"))
        check_choice(setting("text_unit"), self.text_unit, TextUnit)
        check_choice(setting("mix_by"), self.mix_by, MixBy)
        check_choice(setting("quality_checks"), self.quality_checks, QualityChecks)
        object.__setattr__(self, "allow_loss", to_strings(self.allow_loss))
        for kind in self.allow_loss:
            check_choice(setting("allow_loss"), kind, SeriousOmission)
        check_choice(setting("duplicates"), self.duplicates, Duplicates)
        keys = check_strings(self.duplicates_by, setting("duplicates_by"))
        object.__setattr__(self, "duplicates_by", split_list(keys))


@dataclass(frozen=True, slots=True)
class EvalConfig:
    """Records held out for evaluation, as a separate build in OUTPUT/eval."""

    eval_fraction: float = 0.0
    """Share of the records to hold out, chosen by a hash of the record: equal records are in the
    same split, whatever their order."""
    eval_seed: int = 0
    """Seed of that hash."""
    eval_input: tuple[str, ...] = ()
    """Inputs to use for evaluation instead."""
    eval_split: str | None = None
    """Split of the same dataset to use for evaluation instead."""
    eval_packing: EvalPacking | None = None
    """Packing of the evaluation build. Default: the value of --packing."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "eval_input", _expand_paths(to_strings(self.eval_input)))
        check_number(self.eval_fraction, setting("eval_fraction"), 0, 1)
        if not self.eval_fraction < 1:
            raise ConfigError(
                f"{setting('eval_fraction')} is {self.eval_fraction}",
                remedy="use a fraction from 0 to below 1, such as 0.05",
            )
        check_integer(self.eval_seed, setting("eval_seed"), 0, 2**64 - 1)
        if self.eval_packing is not None:
            check_choice(setting("eval_packing"), self.eval_packing, EvalPacking)
        names = ("eval_fraction", "eval_input", "eval_split")
        specified = [setting(name) for name in names if getattr(self, name)]
        if len(specified) > 1:
            raise ConfigError(
                f"{' and '.join(specified)} are both given",
                remedy="choose one source of evaluation records",
            )
