"""Parsing of the command line and YAML files of `sfttrain run` into dataclasses."""

from __future__ import annotations

import dataclasses
import difflib
import json
from argparse import Action
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from transformers import HfArgumentParser

from sftprep.config import read_config_file
from sftprep.errors import ConfigError, setting
from sfttrain.config.model_config import ModelConfig
from sfttrain.config.sft_config import SFTConfig

LORA_LEARNING_RATE = 2e-4
"""The learning rate for adapters, if none is specified."""


NO_EVALUATION = "none"
"""The value of eval_data for a run without an evaluation."""


@dataclass
class RunConfig:
    """The data of a run, and the form of its summary."""

    data: str | None = field(
        default=None,
        metadata={
            "help": (
                "Folder of packs that `sftprep build` wrote, or raw records, on a disk or at a URL"
                " (s3://, gs://, az://, hf://); also accepted as DIR, without the flag."
            )
        },
    )
    eval_data: str | None = field(
        default=None,
        metadata={
            "help": (
                "Folder of packs, or raw records, to evaluate on; by default the evaluation build"
                " in DIR/eval, if DIR is a build that has one; none: do not evaluate."
            )
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "As in TRL, instead of DIR: a dataset on the Hub, or anything that DIR can be."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of dataset_name."}
    )
    dataset_train_split: str = field(
        default="train", metadata={"help": "Split of dataset_name to train on."}
    )
    dataset_test_split: str = field(
        default="test",
        metadata={"help": "Split of dataset_name to evaluate on, unless eval_strategy is no."},
    )
    dataset_streaming: bool = field(
        default=False, metadata={"help": "Read dataset_name without downloading it first."}
    )
    stream: list[str] | None = field(
        default=None,
        metadata={
            "help": (
                "Raw records to tokenize while the model trains, instead of DIR; requires"
                " --max_steps."
            )
        },
    )
    stream_window: int = field(
        default=4096,
        metadata={"help": "With --stream: number of sequences that are packed together."},
    )
    stream_lanes: int = field(
        default=16,
        metadata={
            "help": (
                "With --stream: number of parts into which the records are divided; a multiple of"
                " the number of ranks."
            )
        },
    )
    stream_order: str = field(
        default="shuffle",
        metadata={
            "help": "With --stream: shuffle the records, or keep their order.",
            "choices": ["shuffle", "keep"],
        },
    )
    json: bool = field(default=False, metadata={"help": "Print the summary as JSON on stdout."})


@dataclass(frozen=True)
class Request:
    """The settings of one command."""

    run: RunConfig
    training: SFTConfig
    model: ModelConfig


def read_arguments(arguments: Sequence[str]) -> Request:
    """Parse the arguments after `sfttrain run`.

    Flags take precedence over the YAML files of --config.

    Args:
        arguments: The arguments, without the command.

    Raises:
        ConfigError: A setting is unknown (the remedy names the nearest known one), has a value of
            the wrong type, or is missing.
    """
    # 1. Parse the files and then the flags, which replace them. They are not parsed together: a
    #    list at the end of a file would take DIR for its next item.
    parser = run_parser()
    flags, files = _separate_config_files(list(arguments))
    from_files = [
        token for path in files for token in _to_flags(read_config_file(path), parser.names(), path)
    ]
    namespace, _ = parser.parse_known_args(from_files)
    namespace, rest = parser.parse_known_args(flags, namespace)
    parser.reject_unknown(rest)
    if len(rest) > 1:
        raise ConfigError(
            f"only one folder of packs can be trained on; these were specified: {', '.join(rest)}",
            remedy="specify one DIR",
        )
    values = vars(namespace)
    if rest:
        values["data"] = rest[0]
    # 2. Apply the defaults that depend on other settings, unless they were specified.
    specified = {
        token.partition("=")[0].lstrip("-").replace("-", "_")
        for token in [*from_files, *flags]
        if token.startswith("--")
    }
    if values["use_peft"] and "learning_rate" not in specified:
        values["learning_rate"] = LORA_LEARNING_RATE
    values["data"] = values["data"] or values["dataset_name"]
    _check_required(values)
    # 3. Create the dataclasses, which check their values.
    parts: dict[str, Any] = {
        name: kind(**{f.name: values[f.name] for f in dataclasses.fields(kind) if f.init})
        for name, kind in _KINDS.items()
    }
    if parts["training"].eval_strategy == "no" and specified & _EVAL_STRATEGY:
        # As in TRL, "no" leaves out the evaluation set that comes with the data. Where it is only
        # the default, the run evaluates once, at the end.
        parts["run"].eval_data = parts["run"].eval_data or NO_EVALUATION
    if parts["model"].attn_implementation and "attn" not in specified:
        parts["training"] = dataclasses.replace(
            parts["training"], attn=parts["model"].attn_implementation
        )
    return Request(**parts)


def full_help() -> str:
    """Return the text of `sfttrain run --help-all`."""
    text: str = run_parser().format_help()
    return text


def run_parser() -> SettingsParser:
    """Return the parser of `sfttrain run`."""
    usage = "sfttrain run DIR --model M --output_dir DIR [options]"
    return SettingsParser(list(_KINDS.values()), "sfttrain run", usage)


class SettingsParser(HfArgumentParser):  # type: ignore[misc]
    """An HfArgumentParser without abbreviations, with ConfigError for its errors.

    An abbreviation can change its meaning with each new option.

    Args:
        kinds: The dataclasses of the settings.
        command: The command, for messages.
        usage: Its usage.
    """

    def __init__(self, kinds: list[Any], command: str, usage: str) -> None:
        super().__init__(
            kinds,
            prog=command,
            usage=usage,
            allow_abbrev=False,
            # As in TRL, trust_remote_code is a field of the model's and of the run's settings.
            conflict_handler="resolve",
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(
            message,
            remedy=(
                f"see `{self.prog} --help` for the most important options, `--help-all` for all"
            ),
        )

    def reject_unknown(self, rest: Sequence[str]) -> None:
        """Raise ConfigError for a flag among the arguments that were not parsed."""
        for token in rest:
            if token.startswith("-"):
                name = token.partition("=")[0]
                suggestion = _suggest_name(name, self.names(), is_flag=True, command=self.prog)
                raise ConfigError(f"unknown option {token}", remedy=suggestion)

    def actions(self) -> list[Action]:
        """Return the options, without those for help."""
        return [action for action in self._actions if action.dest != "help"]

    def names(self) -> list[str]:
        """Return the names of the settings, without dashes."""
        return [
            flag.lstrip("-")
            for action in self._actions
            for flag in action.option_strings
            if flag.startswith("--") and "-" not in flag[2:]
        ]


_EVAL_STRATEGY = {"eval_strategy", "evaluation_strategy"}
_KINDS: dict[str, Any] = {"run": RunConfig, "training": SFTConfig, "model": ModelConfig}


def _separate_config_files(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return the flags without --config FILE, and the files."""
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
            raise ConfigError(
                f"{setting('config')} has no file", remedy=f"write {setting('config', 'FILE.yaml')}"
            )
        files.append(value)
    return flags, files


def _to_flags(settings: dict[str, Any], known_names: list[str], path: str) -> list[str]:
    """Convert the settings of a YAML file to flags, for checks by the same parser."""
    tokens: list[str] = []
    for name, value in settings.items():
        if name not in known_names:
            raise ConfigError(
                f"{path}: unknown setting {name!r}", remedy=_suggest_name(name, known_names)
            )
        if value is None:
            continue
        _reject_trust(name, value, path)
        if isinstance(value, list):
            tokens += [f"--{name}", *(str(item) for item in value)]
        else:
            tokens.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return tokens


def _reject_trust(name: str, value: Any, path: str) -> None:
    """Raise ConfigError for a file with permission to run code.

    Files are shared, and only the person at the command line knows which model can be trusted.
    """
    allows_code = value if name == "trust_remote_code" else None
    if name == "model_init_kwargs":
        options = json.loads(value) if isinstance(value, str) and value.startswith("{") else value
        allows_code = options.get("trust_remote_code") if isinstance(options, dict) else None
    if allows_code and str(allows_code).lower() != "false":
        raise ConfigError(
            f"{path} sets trust_remote_code, which is accepted only on the command line",
            remedy=f"read the code of the model, and then add {setting('trust_remote_code', True)}",
        )


def _suggest_name(
    name: str, known_names: list[str], *, is_flag: bool = False, command: str = "sfttrain run"
) -> str:
    near = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), known_names, n=1)
    if not near:
        return f"`{command} --help-all` lists every setting"
    # In a file, settings have no dashes.
    return f"did you mean {setting(near[0]) if is_flag else near[0]}?"


def _check_required(values: dict[str, Any]) -> None:
    if values["stream"] and values["data"]:
        raise ConfigError(
            f"{setting('stream')} and {values['data']} exclude each other",
            remedy="specify only one of them",
        )
    for name, label, remedy in (
        (
            "data",
            "DIR",
            "specify the folder that `sftprep build` wrote, or a file of records: sfttrain run DIR"
            " --model M --output_dir OUT",
        ),
        ("model_name_or_path", setting("model"), f"add {setting('model', 'FOLDER_OR_NAME')}"),
        (
            "output_dir",
            setting("output_dir"),
            f"add {setting('output_dir', 'DIR')}, the folder for the trained model",
        ),
    ):
        if not values[name] and not (name == "data" and values["stream"]):
            raise ConfigError(f"{label} is missing", remedy=remedy)
