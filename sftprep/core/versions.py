"""Versions of packages, without importing them."""

from __future__ import annotations


def version_of(package: str) -> str:
    """Of the package that is installed; "" where there is none."""
    from importlib import metadata  # 10 ms, which workers have no use for

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
