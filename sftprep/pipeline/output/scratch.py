"""The local folder of a build whose output is elsewhere: in a store, or on the Hub.

The shards of groups that are done are sent to the output while the build runs, and are removed from
the folder: it has room for some groups, and not for the whole build. No manifest names them before
the commit. Each one leaves a file with its digest, so a build that was killed does not repeat its
group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from sftprep.config.build import OutputConfig
from sftprep.config.cache_location import cache_dir
from sftprep.core.atomic_write import storage_errors, write_bytes
from sftprep.errors import OutputBusy, setting
from sftprep.pipeline.output.folder import OutputFolder, claim_output
from sftprep.shards.group import ShardInfo
from sftprep.shards.layout import SENT_SUFFIX, SHARD_FOLDER
from sftprep.stores.hub import NewFile


@dataclass(frozen=True, kw_only=True)
class ScratchOutput(ABC):
    """The part of the interface of `OutputFolder` that such a build has before its commit.

    Attributes:
        scratch: The local folder that the build works in.
        waiting: The shards to be sent next, by their names.
    """

    scratch: OutputFolder
    waiting: dict[str, NewFile] = field(default_factory=dict)

    @property
    def work(self) -> Path:
        """The folder of spills, recipes and uncommitted files."""
        return self.scratch.work

    def staging(self, *, evaluation: bool) -> Path:
        """Return the folder for the files of a build before the commit."""
        return self.scratch.staging(evaluation=evaluation)

    @property
    @abstractmethod
    def batch(self) -> int:
        """The number of shards that are sent together."""

    @abstractmethod
    def send(self, files: list[NewFile]) -> None:
        """Write files to the output, where no manifest names them yet."""

    def send_shards(self, shards: Iterable[ShardInfo]) -> None:
        """Send the shards of a group that is done, in batches; the rest stays for a later call.

        Args:
            shards: The shards.

        Raises:
            SftprepError: The output cannot be written to.
        """
        for info in shards:
            name = f"{SHARD_FOLDER}/{info.name}"
            if (self.work / name).exists():  # an earlier build may have sent it
                self.waiting[name] = NewFile(self.work / name, name, info.sha256)
        while len(self.waiting) >= self.batch:
            files = [*self.waiting.values()][: self.batch]
            self.send(files)
            for file in files:
                assert file.sha256 is not None
                write_bytes(_mark_of(file.path), file.sha256.encode())
                with storage_errors(file.path):
                    file.path.unlink()
                del self.waiting[file.name]

    def find_sent(self) -> dict[str, str]:
        """Return the SHA-256 of the shards that were sent, by their names."""
        with storage_errors(self.work):
            return {
                path.relative_to(self.work).as_posix().removesuffix(SENT_SUFFIX): path.read_text()
                for path in self.work.glob(f"{SHARD_FOLDER}/*/*{SENT_SUFFIX}")
            }

    def forget(self, names: Iterable[str]) -> None:
        """Forget that shards were sent, so that their groups are built again."""
        for name in names:
            with storage_errors(self.work):
                _mark_of(self.work / name).unlink(missing_ok=True)


def lost_shards(output: object, names: Iterable[str]) -> OutputBusy:
    """Return the error for shards that were sent and are not in the output any more."""
    return OutputBusy(
        f"another program has removed {min(names)} from {output} while this build ran",
        remedy="run the same command again, which builds what is missing",
    )


def _mark_of(path: Path) -> Path:
    return path.with_name(f"{path.name}{SENT_SUFFIX}")


@contextmanager
def claim_scratch(settings: OutputConfig, url: str) -> Iterator[OutputFolder]:
    """Claim the local folder of a build for a URL, in which its spills are found after a kill.

    Args:
        settings: The settings of the output.
        url: The URL of the output.

    Raises:
        SftprepError: The errors of `claim_output`.
    """
    scratch = Path(settings.scratch).absolute() if settings.scratch else cache_dir() / "scratch"
    claim = claim_output(scratch / sha256(url.encode()).hexdigest()[:16], overwrite=True)
    with ExitStack() as stack:
        try:
            local = stack.enter_context(claim)
        except OutputBusy as error:
            raise OutputBusy(
                f"{error.message}, the scratch folder of {url}",
                remedy=[
                    f"wait until it has ended, or choose another {setting('output')}",
                    f"use another scratch folder: {setting('scratch', 'DIR')}",
                ],
            ) from error
        yield local
