"""The folder of everything kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

from sftprep.config.validation import local_folder
from sftprep.errors import ConfigError

_LIMIT_GB = 50.0


def cache_dir() -> Path:
    """Return $SFTPREP_CACHE, else $XDG_CACHE_HOME/sftprep, else ~/.cache/sftprep.

    No other module reads these variables.

    Raises:
        ConfigError: One of them is a URL.
    """
    if cache_folder := os.environ.get("SFTPREP_CACHE"):
        return Path(local_folder(cache_folder, "SFTPREP_CACHE"))
    if shared_folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(local_folder(shared_folder, "XDG_CACHE_HOME")) / "sftprep"
    return Path.home() / ".cache" / "sftprep"


def cache_limit() -> int:
    """Return the most bytes that copies of objects take in the cache: $SFTPREP_CACHE_GB, else 50.

    Raises:
        ConfigError: The variable is not a number above 0.
    """
    text = os.environ.get("SFTPREP_CACHE_GB") or str(_LIMIT_GB)
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not 0 < limit < float("inf"):
        raise ConfigError(
            f"SFTPREP_CACHE_GB is {text!r}", remedy="set it to a number of GB, such as 50"
        )
    return int(limit * 1e9)
