"""The packages of the extra `train`, which training needs and preparing data does not."""

from __future__ import annotations

from importlib.util import find_spec

from sftprep.errors import MissingDependency

PACKAGES = ("torch", "accelerate", "peft", "datasets", "safetensors")
"""The packages of `sftprep[train]`; all of them are imported by their names."""


def check_dependencies(needed_for: str) -> None:
    """Check that the packages for training are installed, without importing them.

    Args:
        needed_for: What needs them, for the error.

    Raises:
        MissingDependency: One is not installed.
    """
    for package in PACKAGES:
        if find_spec(package) is None:
            raise MissingDependency(package, extra="train", needed_for=needed_for)
