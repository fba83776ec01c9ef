"""The settings of a build, each checked where it is made."""

from sftprep.config.build import (
    BuildConfig,
    OutputConfig,
    PackConfig,
    TokenizeConfig,
    read_config_file,
)
from sftprep.config.data import EvalConfig, FormatConfig, ReadConfig, SourceConfig, SourceEntry
from sftprep.config.validation import Packing

__all__ = [
    "BuildConfig",
    "EvalConfig",
    "FormatConfig",
    "OutputConfig",
    "PackConfig",
    "Packing",
    "ReadConfig",
    "SourceConfig",
    "SourceEntry",
    "TokenizeConfig",
    "read_config_file",
]
