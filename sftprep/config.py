"""What a build is asked to do: one frozen dataclass a concern, checked once, where it is made.

The string below each field is its help, on the command line too.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import json
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, get_args

from sftprep.errors import ConfigError

FormatName = Literal["auto", "text", "messages", "prompt-completion", "sharegpt", "alpaca"]
TrainOn = Literal["auto", "all", "completion", "assistant"]
Packing = Literal["bfd", "none"]
OnBadRecord = Literal["error", "quarantine"]
EncoderChoice = Literal["auto", "gigatoken", "tokenizers"]
TemplateWay = Literal["auto", "jinja"]


@dataclass(frozen=True, slots=True)
class SourceConfig:
    """Where records come from."""

    inputs: tuple[str, ...] = ()
    """Files, globs or folders of .jsonl, .jsonl.gz, .jsonl.zst; several are read in the order given."""

    def __post_init__(self) -> None:
        if isinstance(self.inputs, str):
            object.__setattr__(self, "inputs", (self.inputs,))
        object.__setattr__(self, "inputs", tuple(str(i) for i in self.inputs))


@dataclass(frozen=True, slots=True)
class FormatConfig:
    """How a record is read, and which of its tokens are trained."""

    format: FormatName = "auto"
    """Format of the records; auto looks at the keys of the first record of each input."""
    text_field: str = "text"
    """Key that holds the text, for the text format."""
    map: tuple[str, ...] = ()
    """Renames keys before the format is read: question=prompt,answer=completion."""
    train_on: TrainOn = "auto"
    """Tokens that are trained. auto: the completion where there is one, else every token; assistant: assistant turns only."""

    def __post_init__(self) -> None:
        _check_choice("format", self.format, FormatName)
        _check_choice("train_on", self.train_on, TrainOn)
        given = (self.map,) if isinstance(self.map, str) else self.map
        pairs = tuple(pair.strip() for entry in given for pair in entry.split(",") if pair.strip())
        for pair in pairs:
            source, equals, target = pair.partition("=")
            if not (equals and source and target):
                raise ConfigError(
                    f"--map {pair!r} is not of the form key=name", remedy="write --map question=prompt,answer=completion"
                )
        object.__setattr__(self, "map", pairs)

    def renames(self) -> dict[str, str]:
        """The key renames: name in the record -> name that the formats know."""
        return dict(pair.split("=", 1) for pair in self.map)


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
    """auto: gigatoken where it gives the ids of tokenizers on this tokenizer, tokenizers otherwise."""
    template_way: TemplateWay = "auto"
    """auto: chat templates run as compiled pieces where that is exact, as Jinja otherwise; jinja: always as Jinja."""

    def __post_init__(self) -> None:
        _check_choice("encoder", self.encoder, EncoderChoice)
        _check_choice("template_way", self.template_way, TemplateWay)
        if self.date is not None:
            try:
                datetime.date.fromisoformat(self.date)
            except ValueError as error:
                raise ConfigError(f"--date {self.date!r} is no date", remedy="write it as 2026-01-31") from error


@dataclass(frozen=True, slots=True)
class PackConfig:
    """How sequences become packs."""

    max_length: int | None = None
    """Tokens in a pack, and the longest sequence kept; longer ones are cut. Default: the tokenizer's limit, at most 1024."""
    packing: Packing = "bfd"
    """bfd: best-fit decreasing over the whole corpus; none: one sequence a row."""
    seed: int = 0
    """Seed of the order in which packs are written."""

    def __post_init__(self) -> None:
        _check_choice("packing", self.packing, Packing)
        if self.max_length is not None and not 2 <= self.max_length < 2**31:
            raise ConfigError(
                f"max_length is {self.max_length}: a sequence needs two tokens to train one, and lengths are 32-bit",
                remedy="give --max-length 2 or more, 1024 say",
            )
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed is {self.seed}", remedy="give a seed from 0 to 18446744073709551615")


@dataclass(frozen=True, slots=True)
class OutputConfig:
    """Where the build goes and how it is run; nothing here but `position_ids` and `shard_tokens` changes a byte of it."""

    output: str = ""
    """Folder for the build."""
    overwrite: bool = False
    """Replace a finished build that stands in the output folder."""
    position_ids: bool = True
    """Store position ids in the shards; without them readers derive them from seq_lengths."""
    shard_tokens: int = 16 * 1024 * 1024
    """Tokens in a shard file, about."""
    workers: int | None = None
    """Worker processes; by default one a core, and none for small inputs."""
    on_bad_record: OnBadRecord = "error"
    """error: stop at the first record that cannot be used; quarantine: set it aside in rejected.jsonl and go on."""
    max_rejected: str = "1%"
    """Quarantine fails above this many rejected records: a percentage (1%) or a count (250)."""
    keep_spill: bool = False
    """Keep the intermediate files, which a later build with the same records and settings reuses."""

    def __post_init__(self) -> None:
        _check_choice("on_bad_record", self.on_bad_record, OnBadRecord)
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"workers is {self.workers}", remedy="give --workers 1 or more")
        if self.shard_tokens < 1:
            raise ConfigError(f"shard_tokens is {self.shard_tokens}", remedy="give a positive number of tokens")
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
                f"max_rejected is {self.max_rejected!r}", remedy="write a percentage such as 1%, or a count such as 250"
            )
        return value / 100 * records if text.endswith("%") else value


@dataclass(frozen=True, slots=True)
class BuildConfig:
    """A whole build. `BuildConfig.of(...)` takes the same settings flat, by the names they have on the command line."""

    source: SourceConfig = field(default_factory=SourceConfig)
    format: FormatConfig = field(default_factory=FormatConfig)
    tokenize: TokenizeConfig = field(default_factory=TokenizeConfig)
    pack: PackConfig = field(default_factory=PackConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    @classmethod
    def of(cls, **settings: Any) -> BuildConfig:
        """Make a config from flat settings, as `BuildConfig.of(inputs="a.jsonl", tokenizer="gpt2", output="out")`.

        Raises ConfigError for an unknown name, with the nearest known one.
        """
        parts: dict[str, dict[str, Any]] = {part: {} for part in _PARTS}
        for name, value in settings.items():
            part = _PART_OF.get(name)
            if part is None:
                near = difflib.get_close_matches(name, _PART_OF, n=1)
                raise ConfigError(
                    f"unknown setting {name!r}",
                    remedy=f"did you mean {near[0]!r}?" if near else f"known settings: {', '.join(sorted(_PART_OF))}",
                )
            parts[part][name] = value
        return cls(**{part: kind(**parts[part]) for part, kind in _PARTS.items()})

    def flat(self) -> dict[str, Any]:
        """The settings as one flat dictionary of JSON values."""
        return {name: value for part in _PARTS for name, value in dataclasses.asdict(getattr(self, part)).items()}


def digest(*parts: object) -> str:
    """SHA-256, in hex, of JSON-able values: the same on every machine and in every version of Python."""
    return sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")).hexdigest()


def read_config_file(path: str) -> dict[str, Any]:
    """Read a YAML file of flat settings; names may be spelled with - or _.

    Raises ConfigError where the file is missing, is no mapping or is not YAML.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read the config file {path}: {error.strerror}", remedy="check the path given to --config"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}", remedy="write lines such as  max_length: 2048") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path} holds a {type(content).__name__}, not settings", remedy="write lines such as  max_length: 2048"
        )
    return {str(name).replace("-", "_"): value for name, value in content.items()}


_PARTS: dict[str, type] = {
    "source": SourceConfig,
    "format": FormatConfig,
    "tokenize": TokenizeConfig,
    "pack": PackConfig,
    "output": OutputConfig,
}
_PART_OF = {f.name: part for part, kind in _PARTS.items() for f in dataclasses.fields(kind)}


def _check_choice(name: str, value: object, kind: Any) -> None:
    choices = get_args(kind)
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}", remedy=f"choose one of: {', '.join(choices)}")
