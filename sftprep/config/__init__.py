"""The settings of a build, checked when a configuration is created."""

from sftprep.config.build import (
    BuildConfig,
    OutputConfig,
    PackConfig,
    TokenizeConfig,
    read_config_file,
)
from sftprep.config.cache_location import cache_dir
from sftprep.config.data import EvalConfig, ReadConfig, SourceConfig, SourceEntry
from sftprep.config.record_format import FormatConfig
from sftprep.config.user_functions import function_key, to_function_setting
from sftprep.config.validation import Packing, check_local_path

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
    "cache_dir",
    "check_local_path",
    "function_key",
    "read_config_file",
    "to_function_setting",
]
