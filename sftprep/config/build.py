"""What a build is asked to do: one frozen dataclass a concern, checked once, where it is made.

The string below each field is its help, on the command line too.
"""

from __future__ import annotations

import dataclasses
import datetime
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sftprep.config.data import EvalConfig, FormatConfig, ReadConfig, SourceConfig, SourceEntry
from sftprep.config.validation import (
    EncoderChoice,
    FormatName,
    OnBadRecord,
    Order,
    Overlong,
    Packing,
    TemplateWay,
    TrainOn,
    TruncateSide,
    check_choice,
    check_whole,
    expand_path,
    local_folder,
    unknown_setting,
)
from sftprep.errors import ConfigError

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
    "TemplateWay",
    "TokenizeConfig",
    "TrainOn",
    "TruncateSide",
    "read_config_file",
]


@dataclass(frozen=True, slots=True)
class TokenizeConfig:
    """Which tokenizer and chat template, and how they are run."""

    tokenizer: str = ""
    """Folder of a tokenizer or model, or its name on the Hub."""
    chat_template: str | None = None
    """File with a Jinja chat template, used instead of the tokenizer's own."""
    eos_token: str | None = None
    """Token that ends a text or a turn, instead of the tokenizer's own."""
    date: str | None = None
    """Day that templates see as today, YYYY-MM-DD; the day of the build where it is not given."""
    encoder: EncoderChoice = "auto"
    """auto: gigatoken where it gives the ids of tokenizers on this tokenizer, tokenizers
    otherwise."""
    template_backend: TemplateWay = "auto"
    """auto: chat templates run as compiled pieces where that is exact, as Jinja otherwise; jinja:
    always as Jinja."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokenizer", expand_path(self.tokenizer, "--tokenizer"))
        if self.chat_template is not None:
            template = expand_path(self.chat_template, "--chat-template")
            object.__setattr__(self, "chat_template", template)
        check_choice("encoder", self.encoder, EncoderChoice)
        check_choice("template_backend", self.template_backend, TemplateWay)
        if self.date is not None:
            try:
                datetime.date.fromisoformat(self.date)
            except ValueError as error:
                raise ConfigError(
                    f"--date {self.date!r} is no date", remedy="write it as 2026-01-31"
                ) from error


@dataclass(frozen=True, slots=True)
class PackConfig:
    """How sequences become packs."""

    max_length: int | None = None
    """Tokens in a pack, and the longest sequence kept; longer ones are cut. Default: the
    tokenizer's limit, at most 1024."""
    packing: Packing = "bfd"
    """bfd: best-fit decreasing over the whole corpus; bfd_split: the same, with --overlong split;
    wrapped: one stream, cut every max_length tokens; none: one sequence a row."""
    overlong: Overlong = "truncate"
    """What happens to a sequence longer than max_length. truncate: cut off; split: cut into
    several; drop: left out; error: its record is a bad one."""
    truncate_side: TruncateSide = "right"
    """End at which a sequence is cut: right keeps its start, left its end."""
    pack_window: int | None = None
    """Pack windows of so many sequences, as a stream does, and not the whole corpus at once: 4096,
    say."""
    order: Order = "shuffle"
    """shuffle: packs are written in an order that the seed chooses; keep: in the order in which
    they were made."""
    lanes: int = 16
    """With --pack-window: parts that the input is dealt into, each with a window of its own."""
    seed: int = 0
    """Seed of the order in which packs are written."""

    def __post_init__(self) -> None:
        check_choice("packing", self.packing, Packing)
        check_choice("overlong", self.overlong, Overlong)
        check_choice("truncate_side", self.truncate_side, TruncateSide)
        if self.packing == "bfd_split":
            object.__setattr__(self, "packing", "bfd")
            object.__setattr__(self, "overlong", "split")
        if self.packing == "wrapped" and self.pack_window is not None:
            raise ConfigError(
                "--packing wrapped is one stream, and --pack-window packs several apart",
                remedy="leave out --pack-window, or choose --packing bfd",
            )
        if self.packing == "wrapped" and self.overlong != "truncate":
            raise ConfigError(
                f"--packing wrapped has no overlong sequences: --overlong {self.overlong} means"
                " nothing there",
                remedy="leave out --overlong, or choose --packing bfd",
            )
        check_choice("order", self.order, Order)
        check_whole(self.pack_window, "pack_window", 1, 2**31 - 1)
        if self.pack_window is not None and self.packing != "bfd":
            raise ConfigError(
                f"--packing {self.packing} knows no window",
                remedy="leave out --pack-window, or take --packing bfd",
            )
        check_whole(self.lanes, "lanes", 1, 65_536)
        # A sequence needs two tokens to train one, and lengths are 32-bit.
        check_whole(self.max_length, "max_length", 2, 2**31 - 1)
        check_whole(self.seed, "seed", 0, 2**64 - 1)


@dataclass(frozen=True, slots=True)
class OutputConfig:
    """Where the build goes and how it is run; nothing here but `position_ids` and `shard_tokens`
    changes a byte of it."""

    output: str = ""
    """Folder for the build."""
    overwrite: bool = False
    """Replace a finished build that stands in the output folder."""
    position_ids: bool = True
    """Store position ids in the shards; without them readers derive them from seq_lengths."""
    shard_tokens: int = 4 * 1024 * 1024
    """Tokens in a shard file, about."""
    workers: int | None = None
    """Worker processes; by default one for each 24 MB of input, up to one a core."""
    on_bad_record: OnBadRecord = "error"
    """error: stop at the first record that cannot be used; quarantine: set it aside in
    rejected.jsonl and go on."""
    max_rejected: str = "1%"
    """Quarantine fails above this many rejected records: a percentage (1%) or a count (250)."""
    keep_spill: bool = False
    """Keep the intermediate files, which a later build with the same records and settings
    reuses."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", local_folder(self.output, "--output"))
        check_choice("on_bad_record", self.on_bad_record, OnBadRecord)
        check_whole(self.workers, "workers", 1, 4096)
        check_whole(self.shard_tokens, "shard_tokens", 1, 2**31 - 1)
        self.rejected_limit(0)

    def rejected_limit(self, records: int) -> float:
        """How many of `records` may be rejected."""
        text = self.max_rejected.strip()
        try:
            value = float(text.removesuffix("%"))
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf") or (text.endswith("%") and value > 100):
            raise ConfigError(
                f"max_rejected is {self.max_rejected!r}",
                remedy="write a percentage such as 1%, or a count such as 250",
            )
        return value / 100 * records if text.endswith("%") else value


@dataclass(frozen=True, slots=True)
class BuildConfig:
    """A whole build. `BuildConfig.of(...)` takes the same settings flat, by the names they have on
    the command line."""

    source: SourceConfig = field(default_factory=SourceConfig)
    read: ReadConfig = field(default_factory=ReadConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    format: FormatConfig = field(default_factory=FormatConfig)
    tokenize: TokenizeConfig = field(default_factory=TokenizeConfig)
    pack: PackConfig = field(default_factory=PackConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        if self.evaluation.eval_packing is not None and self.pack.packing == "wrapped":
            raise ConfigError(
                f"--packing wrapped and --eval-packing {self.evaluation.eval_packing} cut sequences"
                " differently",
                remedy="leave out --eval-packing, or build the evaluation records by themselves",
            )

    @classmethod
    def of(cls, **settings: Any) -> BuildConfig:
        """Make a config from flat settings, as `BuildConfig.of(inputs="a.jsonl", tokenizer="gpt2",
        output="out")`.

        Raises ConfigError for an unknown name, with the nearest known one.
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
        """Whether conversations that look wrong are bad records."""
        return self.read.quality_checks == "reject" or (
            self.read.quality_checks == "auto" and self.output.on_bad_record == "quarantine"
        )

    def entries(self) -> tuple[SourceEntry, ...]:
        """The sources to train on, each with what holds for the whole build filled in."""
        given = self.source.sources or tuple(SourceEntry((name,)) for name in self.source.inputs)
        whole = {
            name: getattr(self.read, name)
            for name in ("split", "config_name", "revision", "limit", "strip_nulls")
        }
        return tuple(
            dataclasses.replace(
                entry,
                **{name: value for name, value in whole.items() if getattr(entry, name) is None},
            )
            for entry in given
        )

    def eval_entries(self) -> tuple[SourceEntry, ...]:
        """The sources to evaluate on, where they are others than those to train on."""
        if self.evaluation.eval_split is not None:
            return tuple(
                dataclasses.replace(
                    entry,
                    split=self.evaluation.eval_split,
                    name=f"{entry.name} ({self.evaluation.eval_split})",
                )
                for entry in self.entries()
            )
        return dataclasses.replace(self, source=SourceConfig(self.evaluation.eval_input)).entries()

    def flat(self) -> dict[str, Any]:
        """The settings as one flat dictionary of JSON values."""
        return {
            name: value
            for part in _PARTS
            for name, value in dataclasses.asdict(getattr(self, part)).items()
        }


def read_config_file(path: str) -> dict[str, Any]:
    """Read a YAML file of flat settings; names may be spelled with - or _.

    Raises ConfigError where the file is missing, is no mapping or is not YAML.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(expand_path(path, "--config")).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read the config file {path}: {error.strerror}",
            remedy="check the path given to --config",
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: not UTF-8, or an integer of thousands of digits.
        what = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(
            f"{path} is not YAML: {what}", remedy="write lines such as  max_length: 2048"
        ) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path} holds a {type(content).__name__}, not settings",
            remedy="write lines such as  max_length: 2048",
        )
    return {str(name).replace("-", "_"): value for name, value in content.items()}


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
