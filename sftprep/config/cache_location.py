"""The folder of everything kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

from sftprep.config.validation import local_folder


def cache_dir() -> Path:
    """Return $SFTPREP_CACHE, else $XDG_CACHE_HOME/sftprep, else ~/.cache/sftprep.

    No other code reads these variables.

    Raises:
        ConfigError: One of them is a URL.
    """
    if cache_folder := os.environ.get("SFTPREP_CACHE"):
        return Path(local_folder(cache_folder, "SFTPREP_CACHE"))
    if shared_folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(local_folder(shared_folder, "XDG_CACHE_HOME")) / "sftprep"
    return Path.home() / ".cache" / "sftprep"
