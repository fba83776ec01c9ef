"""The settings of a build, each checked where it is made."""

from sftprep.config.build import BuildConfig, read_config_file
from sftprep.config.data import SourceEntry

__all__ = ["BuildConfig", "SourceEntry", "read_config_file"]
