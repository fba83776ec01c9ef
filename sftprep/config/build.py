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

from sftprep.config.data import EvalConfig, FormatConfig, ReadConfig, SourceConfig, SourceEntry
from sftprep.config.validation import (
    EncoderChoice,
    ExecutorChoice,
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
    is_url,
    local_folder,
    output_place,
    parse_part,
    unknown_setting,
)
from sftprep.errors import ConfigError, setting

GROUP_BYTES = 1 << 30

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
    """File with a Jinja chat template, which replaces that of the tokenizer; or the name of one of
    several templates that the tokenizer has."""
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
    """bfd: best-fit decreasing over the whole corpus; bfd_split: the same, with --overlong split;
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
class OutputConfig:
    """The output folder, and the execution of the build.

    Of these settings, only `position_ids`, `shard_tokens` and `group_bytes` change the bytes of the
    shards.
    """

    output: str = ""
    """Folder of the build, or its URL: s3://bucket/folder, hf://datasets/org/name."""
    overwrite: bool = False
    """Replace a finished build in the output folder."""
    position_ids: bool = True
    """Store position ids in the shards; otherwise readers derive them from seq_lengths."""
    shard_tokens: int | None = None
    """Approximate number of tokens in a shard file. Default: 4 million, and 16 million in a group
    of 64 million or more."""
    group_bytes: int = GROUP_BYTES
    """Size of a group in bytes of input: the packs of a group are planned together, and larger
    inputs become several groups. Default: 1 GiB."""
    workers: int | None = None
    """Worker processes. Default: one for each 24 MB of input, at most one per core."""
    executor: ExecutorChoice = "local"
    """local: worker processes on this machine; ray: tasks on a Ray cluster, all of whose machines
    reach the inputs and the output under the same paths."""
    ray_address: str | None = None
    """Address of the Ray cluster (auto, or host:port). Default: one that is started here."""
    part: str | None = None
    """I/K: write only the I-th of K parts of the groups, on one of several machines that share the
    output folder. The same command without it writes what is missing and finishes the build."""
    on_bad_record: OnBadRecord = "error"
    """error: stop at the first record that cannot be used; quarantine: write it to a file in
    DIR/rejected, and continue."""
    max_rejected: str = "1%"
    """Maximum number of quarantined records: a percentage (1%) or a count (250)."""
    scratch: str | None = None
    """Local folder of the intermediate files of an output in a store. Default: in the cache."""
    keep_spill: bool = False
    """Keep the intermediate files; a later build of the same records reuses them, also with other
    lengths or packing."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", output_place(self.output, setting("output")))
        if self.scratch is not None:
            object.__setattr__(self, "scratch", local_folder(self.scratch, setting("scratch")))
            if not is_url(self.output):
                raise ConfigError(
                    f"{setting('scratch')} is for an output in a store, and {setting('output')} is"
                    f" {self.output}",
                    remedy=f"leave out {setting('scratch')}",
                )
        check_choice(setting("on_bad_record"), self.on_bad_record, OnBadRecord)
        check_choice(setting("executor"), self.executor, ExecutorChoice)
        check_integer(self.workers, setting("workers"), 1, 4096)
        check_integer(self.shard_tokens, setting("shard_tokens"), 1, 2**31 - 1)
        check_integer(self.group_bytes, setting("group_bytes"), 1 << 16, 1 << 44)
        parse_part(self.part, setting("part", self.part))
        self.rejected_limit(0)  # raises for an invalid `max_rejected`, before any work is done

    def rejected_limit(self, records: int) -> float:
        """Return how many of `records` may be rejected.

        Raises:
            ConfigError: `max_rejected` is neither a percentage nor a count.
        """
        # Python users may write a count as a number. A fraction would be ambiguous: 1.0 is neither
        # certainly 100 % nor certainly one record.
        is_text = type(self.max_rejected) in (str, int)
        text = str(self.max_rejected).strip() if is_text else ""
        try:
            value = float(text.removesuffix("%"))
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf") or (text.endswith("%") and value > 100):
            raise ConfigError(
                f"{setting('max_rejected')} is {self.max_rejected!r}",
                remedy="write a percentage such as 1%, or a count such as 250",
            )
        return value / 100 * records if text.endswith("%") else value


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
        ConfigError: The file cannot be read, is not YAML, or is not a mapping.
    """
    import yaml

    try:
        file = Path(expand_path(path, "the path of the config file"))
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
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
