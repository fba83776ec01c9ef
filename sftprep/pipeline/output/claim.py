"""The output of a build: a local folder, a folder in a store, or a repository on the Hub."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeAlias

from sftprep.config.build import OutputConfig
from sftprep.pipeline.output.folder import OutputFolder, claim_output
from sftprep.pipeline.output.hub import OutputHub, claim_repository
from sftprep.pipeline.output.store import OutputStore, claim_store
from sftprep.stores.folder import StoreFolder, folder_of
from sftprep.stores.hub import HubRepository, is_hub_url

Destination: TypeAlias = Path | StoreFolder | HubRepository
"""Where a build is written."""
Output: TypeAlias = OutputFolder | OutputStore | OutputHub
"""A destination that a build has claimed."""


def find_destination(output: str) -> Destination:
    """Return the destination of a build from its setting `output`.

    Raises:
        ConfigError: It is a URL of an unknown protocol, or names no folder or repository.
        MissingDependency: The package for it is not installed.
        StorageError: Its library cannot be set up.
    """
    return HubRepository.of_url(output) if is_hub_url(output) else folder_of(output)


def claim_destination(
    destination: Destination, settings: OutputConfig
) -> AbstractContextManager[Output]:
    """Claim the destination of a build while a `with` block runs.

    Args:
        destination: The destination.
        settings: The settings of the output.

    Raises:
        SftprepError: The errors of `claim_output`, `claim_store` and `claim_repository`.
    """
    if isinstance(destination, HubRepository):
        return claim_repository(destination, settings)
    if isinstance(destination, StoreFolder):
        return claim_store(destination, settings)
    return claim_output(destination, overwrite=settings.overwrite)
