"""What a build reads: its sources, how their records are read, and which of them are held out for
evaluation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from sftprep.config.user_functions import name_of
from sftprep.config.validation import (
    Duplicates,
    EvalPacking,
    FormatName,
    QualityChecks,
    TrainOn,
    check_choice,
    check_factor,
    check_kind,
    check_limit,
    check_strings,
    check_whole,
    expand_path,
    number_of,
    strings,
    unknown_setting,
)
from sftprep.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SourceEntry:
    """One source of a mixture, an item of `sources:` in a config file. What is None is as for the
    whole build.

    Of its records, in this order: the first `limit` are read; those held out for the evaluation are
    set apart; of the rest, each stands in the build `repeat` times (a fraction: that share of them,
    chosen by a seeded hash, once more). weight: the shares of sources in records; the source with
    the least records for its weight is used whole, the others in part.
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
    format: FormatName | None = None
    text_field: str | None = None
    map: tuple[str, ...] | None = None
    train_on: TrainOn | None = None
    formatting_func: str | None = None

    def __post_init__(self) -> None:
        inputs = check_strings(self.inputs, "the path of a source")
        object.__setattr__(self, "inputs", _expanded(inputs))
        object.__setattr__(self, "name", str(self.name or ", ".join(self.inputs)))
        if self.map is not None:
            object.__setattr__(self, "map", check_strings(self.map, f"the map of {self.name}"))
        for key in ("weight", "repeat"):
            object.__setattr__(self, key, number_of(getattr(self, key)))
        for key in ("split", "config_name", "revision", "text_field"):
            check_kind(getattr(self, key), f"the {key} of {self.name}", str, "text")
        check_kind(self.strip_nulls, f"the strip_nulls of {self.name}", bool, "true or false")
        if self.weight is not None:
            check_factor(self.weight, f"the weight of {self.name}", 1e-6, 1e6)
        check_factor(self.repeat, f"the repeat of {self.name}", 1e-6, 1000)
        check_limit(self.limit, f"the limit of {self.name}")

    @classmethod
    def of(cls, item: object) -> SourceEntry:
        """From an item of a config file: a path, or a mapping with `path` or `inputs`. Raises
        ConfigError."""
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
            raise ConfigError(f"a source names no input: {item!r}", remedy="give it a path:")
        return cls(**values)

    def format_config(self, whole: FormatConfig) -> FormatConfig:
        """How the records of this source are read. Raises ConfigError."""
        own = {
            name: getattr(self, name)
            for name in ("format", "text_field", "map", "train_on", "formatting_func")
        }
        given = {name: value for name, value in own.items() if value is not None}
        return dataclasses.replace(whole, **given) if given else whole


@dataclass(frozen=True, slots=True)
class SourceConfig:
    """Where records come from."""

    inputs: tuple[str, ...] = ()
    """Files, globs, folders, or data sets on the Hub (org/name); several are read in the order
    given."""
    sources: tuple[SourceEntry, ...] = ()
    """Instead of inputs: the sources of a mixture, each with settings of its own."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", _expanded(strings(self.inputs)))
        if not isinstance(self.sources, (list, tuple)):
            raise ConfigError(
                f"sources is {self.sources!r}",
                remedy="write a list of sources: - path: chats.jsonl",
            )
        object.__setattr__(self, "sources", tuple(SourceEntry.of(item) for item in self.sources))
        if self.inputs and self.sources:
            raise ConfigError(
                "inputs and sources are both given", remedy="name all inputs in one of the two"
            )
        object.__setattr__(self, "sources", _with_own_names(self.sources))
        weighted = [entry for entry in self.sources if entry.weight is not None]
        if weighted and len(weighted) < len(self.sources):
            without = next(entry.name for entry in self.sources if entry.weight is None)
            raise ConfigError(
                f"the source {without} has no weight, and others have",
                remedy="give every source a weight, or none",
            )


def _expanded(inputs: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(expand_path(name, "an input") for name in inputs)


def _with_own_names(entries: tuple[SourceEntry, ...]) -> tuple[SourceEntry, ...]:
    """The sources with names that tell them apart, as the ledger does: a, a (2)."""
    taken: set[str] = set()
    given = {entry.name for entry in entries}
    named = []
    for entry in entries:
        name, number = entry.name, 1
        while name in taken or (number > 1 and name in given):
            number += 1
            name = f"{entry.name} ({number})"
        taken.add(name)
        named.append(entry if number == 1 else dataclasses.replace(entry, name=name))
    return tuple(named)


@dataclass(frozen=True, slots=True)
class ReadConfig:
    """How much of the sources is read, and which part; a source of a mixture may say otherwise."""

    split: str | None = None
    """Split of a data set that has several; train where it is not given."""
    config_name: str | None = None
    """Configuration (subset) of a data set on the Hub."""
    revision: str | None = None
    """Branch, tag or commit of a data set on the Hub."""
    limit: int | None = None
    """Read so many records of each source at most."""
    strip_nulls: bool = False
    """Leave out keys whose value is null, at every depth; tables have them where other rows have
    the key."""

    quality_checks: QualityChecks = "auto"
    """Conversations that can be read and look wrong (role order, empty turns, no assistant turn, a
    tool's answer without a call, special tokens or image placeholders in the text). reject: as bad
    records; keep: train on them, as TRL does; auto: reject with
    --on-bad-record quarantine, keep otherwise."""
    duplicates: Duplicates = "keep"
    """drop: of records that are the same, or the same but for blanks, use the first one only."""

    def __post_init__(self) -> None:
        check_limit(self.limit, "limit")
        check_choice("quality_checks", self.quality_checks, QualityChecks)
        check_choice("duplicates", self.duplicates, Duplicates)


@dataclass(frozen=True, slots=True)
class EvalConfig:
    """Records that are held out for evaluation, as a build of their own in OUTPUT/eval."""

    eval_fraction: float = 0.0
    """Share of the records to hold out, chosen by a hash of the record: equal records are on the
    same side, in any order."""
    eval_seed: int = 0
    """Seed of that hash."""
    eval_input: tuple[str, ...] = ()
    """Inputs to use for evaluation instead."""
    eval_split: str | None = None
    """Split of the same data set to use for evaluation instead."""
    eval_packing: EvalPacking | None = None
    """Packing of the evaluation build; that of --packing where it is not given."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "eval_input", _expanded(strings(self.eval_input)))
        check_factor(self.eval_fraction, "eval_fraction", 0, 1)
        if not self.eval_fraction < 1:
            raise ConfigError(
                f"eval_fraction is {self.eval_fraction}",
                remedy="give --eval-fraction from 0 to below 1, 0.05 say",
            )
        check_whole(self.eval_seed, "eval_seed", 0, 2**64 - 1)
        if self.eval_packing is not None:
            check_choice("eval_packing", self.eval_packing, EvalPacking)
        given = [
            name for name in ("eval_fraction", "eval_input", "eval_split") if getattr(self, name)
        ]
        if len(given) > 1:
            raise ConfigError(
                f"{' and '.join(given)} are both given",
                remedy="choose one way to get evaluation records",
            )


@dataclass(frozen=True, slots=True)
class FormatConfig:
    """How a record is read, and which of its tokens are trained."""

    format: FormatName = "auto"
    """Format of the records; auto looks at the keys of the first records of each input."""
    text_field: str = "text"
    """Key that holds the text, for the text format."""
    map: tuple[str, ...] = ()
    """Renames keys before the format is read: question=prompt,answer=completion."""
    train_on: TrainOn = "auto"
    """Tokens that are trained. auto: the completion where there is one, else every token;
    assistant: what the assistant says; last-assistant: its last turn."""
    expand_turns: bool = False
    """One example for each assistant turn, as the model sees the conversation when it writes that
    turn; for templates that show earlier turns differently, as those that strip reasoning do."""
    escape_special: bool = False
    """Take special tokens that a record spells out in its texts, such as <|im_end|>, for plain
    text."""
    formatting_func: str | None = None
    """Function that makes the text of a record: package.module:function, or file.py:function."""

    def __post_init__(self) -> None:
        if callable(self.formatting_func):  # from Python, people give the function itself
            object.__setattr__(self, "formatting_func", name_of(self.formatting_func))
        if self.formatting_func is not None:
            function = expand_path(self.formatting_func, "--formatting-func")
            object.__setattr__(self, "formatting_func", function)
        if self.formatting_func is not None and self.format not in ("auto", "text"):
            raise ConfigError(
                f"--formatting-func makes texts of records, and --format is {self.format}",
                remedy="leave out one of the two",
            )
        if self.expand_turns and self.train_on == "all":
            raise ConfigError(
                "--expand-turns with --train-on all would train the early turns of a conversation"
                " again in each of its examples",
                remedy="leave out --train-on, or give --train-on assistant",
            )
        check_choice("format", self.format, FormatName)
        check_choice("train_on", self.train_on, TrainOn)
        given = (self.map,) if isinstance(self.map, str) else self.map
        pairs = tuple(pair.strip() for entry in given for pair in entry.split(",") if pair.strip())
        for pair in pairs:
            source, equals, target = pair.partition("=")
            if not (equals and source and target):
                raise ConfigError(
                    f"--map {pair!r} is not of the form key=name",
                    remedy="write --map question=prompt,answer=completion",
                )
        object.__setattr__(self, "map", pairs)

    def renames(self) -> dict[str, str]:
        """The key renames: name in the record -> name that the formats know."""
        return dict(pair.split("=", 1) for pair in self.map)
