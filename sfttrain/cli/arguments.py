"""The command line and the YAML file of `sfttrain run`, read into the three dataclasses that say
what to do."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from transformers import HfArgumentParser

from sftprep.config import read_config_file
from sftprep.errors import ConfigError
from sfttrain.config.model_config import ModelConfig
from sfttrain.config.sft_config import SFTConfig

LORA_LEARNING_RATE = 2e-4


@dataclass
class RunConfig:
    """What is run, and how it is told."""

    data: str | None = field(
        default=None,
        metadata={
            "help": (
                "Folder of packs that `sftprep build` made, or raw records (or DIR without a flag)."
            )
        },
    )
    eval_data: str | None = field(
        default=None, metadata={"help": "Folder of packs, or raw records, to evaluate on."}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "As in TRL, in place of DIR: a dataset on the Hub, or whatever DIR may be."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of dataset_name."}
    )
    dataset_train_split: str = field(
        default="train", metadata={"help": "Split of dataset_name that is trained on."}
    )
    dataset_test_split: str = field(
        default="test",
        metadata={
            "help": "Split of dataset_name that is evaluated on, if eval_strategy is not no."
        },
    )
    dataset_streaming: bool = field(
        default=False, metadata={"help": "Read dataset_name without downloading it first."}
    )
    stream: list[str] | None = field(
        default=None,
        metadata={
            "help": (
                "Raw records that are tokenized while the model trains, instead of DIR; needs"
                " --max_steps."
            )
        },
    )
    stream_window: int = field(
        default=4096,
        metadata={"help": "With --stream: sequences of which packs are made at a time."},
    )
    stream_lanes: int = field(
        default=16,
        metadata={
            "help": (
                "With --stream: parts that the records are dealt into; a multiple of the number of"
                " ranks."
            )
        },
    )
    stream_order: str = field(
        default="shuffle",
        metadata={
            "help": "With --stream: shuffle, or keep the order of the records.",
            "choices": ["shuffle", "keep"],
        },
    )
    json: bool = field(default=False, metadata={"help": "Print the summary as JSON on stdout."})


@dataclass(frozen=True)
class Request:
    """A whole command."""

    run: RunConfig
    training: SFTConfig
    model: ModelConfig


def read_arguments(arguments: Sequence[str]) -> Request:
    """Read the arguments after `sfttrain run`. A YAML file given with --config comes first, so
    flags win over it.

    Raises ConfigError for unknown names, with the nearest known one, for values of the wrong kind,
    and for what is missing.
    """
    parser = _Parser()
    flags, files = _take_config(list(arguments))
    from_files = [
        token for path in files for token in _as_flags(read_config_file(path), parser.names(), path)
    ]
    namespace, rest = parser.parse_known_args([*from_files, *flags])
    unknown = [token for token in rest if token.startswith("-")]
    if unknown:
        raise ConfigError(
            f"unknown option {unknown[0]}",
            remedy=_nearest(unknown[0].partition("=")[0], parser.names(), "--"),
        )
    if len(rest) > 1:
        raise ConfigError(
            f"one folder of packs is trained on, and these were given: {', '.join(rest)}",
            remedy="give one DIR",
        )
    values = vars(namespace)
    if rest:
        values["data"] = rest[0]
    given = {
        token.partition("=")[0].lstrip("-").replace("-", "_")
        for token in [*from_files, *flags]
        if token.startswith("--")
    }
    if values["use_peft"] and "learning_rate" not in given:
        values["learning_rate"] = LORA_LEARNING_RATE
    values["data"] = values["data"] or values["dataset_name"]
    _require(values)
    parts: dict[str, Any] = {
        name: kind(**{f.name: values[f.name] for f in dataclasses.fields(kind) if f.init})
        for name, kind in _KINDS.items()
    }
    if parts["model"].attn_implementation and "attn" not in given:
        parts["training"] = dataclasses.replace(
            parts["training"], attn=parts["model"].attn_implementation
        )
    return Request(**parts)


def full_help() -> str:
    """The text of `sfttrain run --help-all`."""
    text: str = _Parser().format_help()
    return text


class _Parser(HfArgumentParser):  # type: ignore[misc]
    """HfArgumentParser whose mistakes are ConfigErrors, and which takes no abbreviations: they
    change as options come."""

    def __init__(self) -> None:
        super().__init__(
            list(_KINDS.values()),
            prog="sfttrain run",
            usage="sfttrain run DIR --model M --output_dir DIR [options]",
            allow_abbrev=False,
            # trust_remote_code is a setting of the model and of the training, as in TRL.
            conflict_handler="resolve",
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(
            message,
            remedy=(
                "`sfttrain run --help` lists the options that matter most, `--help-all` all of them"
            ),
        )

    def names(self) -> list[str]:
        """Settings by their names, without dashes."""
        return [
            o.lstrip("-")
            for action in self._actions
            for o in action.option_strings
            if o.startswith("--") and "-" not in o[2:]
        ]


_KINDS: dict[str, Any] = {"run": RunConfig, "training": SFTConfig, "model": ModelConfig}


def _take_config(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Flags without --config FILE, and the files."""
    flags: list[str] = []
    files: list[str] = []
    rest = iter(arguments)
    for token in rest:
        name, equals, value = token.partition("=")
        if name != "--config":
            flags.append(token)
            continue
        value = value if equals else next(rest, "")
        if not value:
            raise ConfigError("--config has no file", remedy="write --config FILE.yaml")
        files.append(value)
    return flags, files


def _as_flags(settings: dict[str, Any], known: list[str], path: str) -> list[str]:
    """Settings of a YAML file as the flags that say the same, so that they are checked in the same
    way."""
    tokens: list[str] = []
    for name, value in settings.items():
        if name not in known:
            raise ConfigError(f"{path}: unknown setting {name!r}", remedy=_nearest(name, known, ""))
        if value is None:
            continue
        _refuse_trust(name, value, path)
        if isinstance(value, list):
            tokens += [f"--{name}", *(str(item) for item in value)]
        else:
            tokens.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return tokens


def _refuse_trust(name: str, value: Any, path: str) -> None:
    """Raise ConfigError where a file allows code to be run.

    Files are passed on, and only the person at the command line knows which model is trusted.
    """
    allows = value if name == "trust_remote_code" else None
    if name == "model_init_kwargs":
        given = json.loads(value) if isinstance(value, str) and value.startswith("{") else value
        allows = given.get("trust_remote_code") if isinstance(given, dict) else None
    if allows and str(allows).lower() != "false":
        raise ConfigError(
            f"{path} sets trust_remote_code, which is taken from the command line only",
            remedy="write --trust_remote_code after reading the code of the model",
        )


def _nearest(name: str, known: list[str], dashes: str) -> str:
    near = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), known, n=1)
    return (
        f"did you mean {dashes}{near[0]}?"
        if near
        else "`sfttrain run --help-all` lists every setting"
    )


def _require(values: dict[str, Any]) -> None:
    if values["stream"] and values["data"]:
        raise ConfigError(
            f"--stream and {values['data']} are both to be trained on", remedy="give one of them"
        )
    for name, flag, remedy in (
        (
            "data",
            "DIR",
            (
                "give the folder that `sftprep build` wrote, or a file of records: sfttrain run DIR"
                " --model M --output_dir OUT"
            ),
        ),
        ("model_name_or_path", "--model", "add --model FOLDER_OR_NAME"),
        ("output_dir", "--output_dir", "add --output_dir DIR, where the trained model goes"),
    ):
        if not values[name] and not (name == "data" and values["stream"]):
            raise ConfigError(f"{flag} is missing", remedy=remedy)
