"""The settings of a build as flags, for the commands that take all of them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from cyclopts import Group, Parameter

from sftprep.config.aliases import replace_aliases
from sftprep.config.build import (
    BuildConfig,
    EvalConfig,
    FormatConfig,
    OutputConfig,
    PackConfig,
    ReadConfig,
    SourceConfig,
    TokenizeConfig,
    read_config_file,
)
from sftprep.errors import ConfigError

if TYPE_CHECKING:
    from sftprep.sources.partition import Source


def flags(title: str, position: int, *, show: bool = True) -> Parameter:
    """Return the parameter for a dataclass of flags with its own help section."""
    return Parameter(name="*", group=Group(title, sort_key=position, show=show), show=show)


def to_build_config(
    inputs: tuple[str, ...],
    config: str | None,
    read: ReadConfig | None,
    format: FormatConfig | None,
    tokenize: TokenizeConfig | None,
    pack: PackConfig | None,
    evaluation: EvalConfig | None,
    output: OutputConfig | None,
) -> BuildConfig:
    """Return the settings of a build.

    Args:
        inputs: The inputs on the command line.
        config: The configuration file, which names the inputs if the command line does not.
        read: The flags of each section; None: the defaults.
        format: See `read`.
        tokenize: See `read`.
        pack: See `read`.
        evaluation: See `read`.
        output: See `read`.

    Raises:
        ConfigError: The file cannot be read, or a setting is not valid.
    """
    from_file = replace_aliases(read_config_file(config)) if config else {}
    return BuildConfig(
        source=SourceConfig(inputs or from_file.get("inputs", ()), from_file.get("sources", ())),
        read=read or ReadConfig(),
        evaluation=evaluation or EvalConfig(),
        format=format or FormatConfig(),
        tokenize=tokenize or TokenizeConfig(),
        pack=pack or PackConfig(),
        output=output or OutputConfig(),
    )


def take_stdin(config: BuildConfig) -> tuple[BuildConfig, list[Source]]:
    """Return the settings without the input `-`, and stdin as a source if it is that input.

    Raises:
        ConfigError: Stdin is closed, a terminal, or not the only input.
    """
    if "-" not in config.source.inputs:
        return config, []
    if len(config.source.inputs) > 1:
        raise ConfigError(
            "- is stdin, which is read as the only input, and there are others",
            remedy="write the records to a file; ./- is a file of this name",
        )
    from sftprep.sources.stdin import stdin_source

    return dataclasses.replace(config, source=SourceConfig()), [stdin_source()]
