"""Versions of installed packages, without importing the packages."""

from __future__ import annotations

from functools import lru_cache


@lru_cache(maxsize=64)  # each call searches the folders of packages
def version_of(package: str) -> str:
    """Return the version of an installed package, or "" if it is not installed."""
    from importlib import metadata  # takes 10 ms, and most worker processes do not need it

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
