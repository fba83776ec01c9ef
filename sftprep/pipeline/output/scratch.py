"""The local folder of a build whose output is elsewhere: in a store, or on the Hub."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from sftprep.config.build import OutputConfig
from sftprep.config.cache_location import cache_dir
from sftprep.pipeline.output.folder import OutputFolder, claim_output


@dataclass(frozen=True, kw_only=True)
class ScratchOutput:
    """The part of the interface of `OutputFolder` that such a build has before its commit.

    Attributes:
        scratch: The local folder that the build works in.
    """

    scratch: OutputFolder

    @property
    def work(self) -> Path:
        """The folder of spills, recipes and uncommitted files."""
        return self.scratch.work

    def staging(self, *, evaluation: bool) -> Path:
        """Return the folder for the files of a build before the commit."""
        return self.scratch.staging(evaluation=evaluation)


def claim_scratch(settings: OutputConfig, url: str) -> AbstractContextManager[OutputFolder]:
    """Claim the local folder of a build for a URL, in which its spills are found after a kill.

    Args:
        settings: The settings of the output.
        url: The URL of the output.

    Raises:
        SftprepError: The errors of `claim_output`.
    """
    scratch = Path(settings.scratch).absolute() if settings.scratch else cache_dir() / "scratch"
    return claim_output(scratch / sha256(url.encode()).hexdigest()[:16], overwrite=True)
