"""The folder of everything that is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

from sftprep.config.validation import local_folder


def cache_dir() -> Path:
    """Return $SFTPREP_CACHE, else $XDG_CACHE_HOME/sftprep, else ~/.cache/sftprep.

    Nothing else reads these variables.

    Raises:
        ConfigError: One of them is a URL.
    """
    if own := os.environ.get("SFTPREP_CACHE"):
        return Path(local_folder(own, "SFTPREP_CACHE"))
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(local_folder(shared, "XDG_CACHE_HOME")) / "sftprep"
    return Path.home() / ".cache" / "sftprep"
