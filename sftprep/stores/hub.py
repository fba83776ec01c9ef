"""Data sets on the Hugging Face Hub: revisions, files and commits.

A revision is resolved to a commit once, and everything is read at that commit. So a reader sees one
state of the repository, even if another program commits meanwhile.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha1, sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from sftprep.core.hashing import digest_of_file
from sftprep.errors import ConfigError, HubError, ShardError
from sftprep.stores.hub_error_conversion import hub_errors

HUB_PREFIX = "hf://datasets/"
_DEFAULT_BRANCH = "main"
_URL = re.compile(
    rf"{HUB_PREFIX}(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/:]+))?(?:/(?P<folder>[^:]+))?",
    re.ASCII,
)
_REPO = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_BUILD_AGAIN = "build again, and push that build"
_FORM = f"write {HUB_PREFIX}org/name[@revision]"


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository.

    Attributes:
        size: Its size in bytes.
        blob: The SHA-1 that git has for it, or for the pointer to it.
        sha256: The SHA-256 of a large file (LFS); None for another one.
    """

    size: int
    blob: str
    sha256: str | None


@dataclass(frozen=True, slots=True)
class NewFile:
    """A file to upload.

    Attributes:
        path: The local file.
        name: Its path in the repository.
        sha256: Its SHA-256 in hex, if it is known.
    """

    path: Path
    name: str
    sha256: str | None = None

    @property
    def size(self) -> int:
        """Its size in bytes.

        Raises:
            ShardError: It cannot be read.
        """
        with _reading(self.path):
            return self.path.stat().st_size

    def is_equal(self, found: HubFile) -> bool:
        """Return whether a file of the repository has the same content."""
        if self.size != found.size:
            return False
        with _reading(self.path):
            if found.sha256 is not None:
                return found.sha256 == (self.sha256 or digest_of_file(self.path, sha256))
            header = b"blob %d\0" % found.size
            return sha1(header + self.path.read_bytes()).hexdigest() == found.blob


@dataclass(frozen=True, slots=True)
class HubRepository:
    """A data set repository on the Hub, at a branch.

    Args:
        name: Its name, as org/name.
        branch: The branch; None for that of a new repository.

    Raises:
        ConfigError: The name is invalid, or the branch is a commit.
    """

    name: str
    branch: str | None = None

    def __post_init__(self) -> None:
        if not _REPO.fullmatch(self.name):
            raise ConfigError(
                f"{self.name} is not the name of a repository on the Hub", remedy="write org/name"
            )
        if self.branch is not None and _COMMIT.fullmatch(self.branch):
            raise ConfigError(
                f"{self.branch} is a commit of {self.name}, which cannot change",
                remedy="specify a branch",
            )

    @classmethod
    def of_url(cls, url: str) -> HubRepository:
        """Return the repository of a URL such as hf://datasets/org/name@branch.

        Raises:
            ConfigError: It has another form, or names a folder.
        """
        repo, revision, folder = _parse(url)
        if folder:
            raise ConfigError(
                f"{url} is a folder of a repository, but a build is a whole repository",
                remedy=_FORM,
            )
        return cls(repo, revision)

    def __str__(self) -> str:
        return f"{HUB_PREFIX}{self.name}" + (
            f"@{quote(self.branch, safe='')}" if self.branch else ""
        )

    def at(self, commit: str) -> str:
        """Return the URL of the files of a commit."""
        return f"{HUB_PREFIX}{self.name}@{commit}"

    def head(self) -> str | None:
        """Return the head of the branch; None without the repository or the branch."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        with self._errors("read"), suppress(RepositoryNotFoundError, RevisionNotFoundError):
            return _commit_of(self.name, self.branch)
        return None

    def check_writable(self) -> None:
        """Check that the token may write, by asking how an empty file would be uploaded.

        Raises:
            HubError: It may not.
        """
        from huggingface_hub import CommitOperationAdd

        with self._errors("write to"):
            _api().preupload_lfs_files(
                self.name,
                [CommitOperationAdd(".sftprep-probe", b"")],
                repo_type="dataset",
                revision=self.branch,
            )

    def create(self, *, private: bool) -> str:
        """Create the repository and the branch if they are missing; return the head.

        Args:
            private: Whether a new repository is private.
        """
        if head := self.head():
            return head
        api = _api()
        with self._errors("create"):
            api.create_repo(self.name, repo_type="dataset", private=private or None, exist_ok=True)
            if self.branch is not None and self.head() is None:
                api.create_branch(self.name, branch=self.branch, repo_type="dataset", exist_ok=True)
            return _commit_of(self.name, self.branch)

    def list_files(self, commit: str) -> dict[str, HubFile]:
        """Return the files of a commit by their paths."""
        with self._errors("list"):
            entries = _api().list_repo_tree(
                self.name, recursive=True, revision=commit, repo_type="dataset"
            )
            return _files_in(entries)

    def find_file(self, commit: str, name: str) -> HubFile | None:
        """Return a file of a commit by its path; None if there is none."""
        with self._errors("read"):
            entries = _api().get_paths_info(self.name, [name], revision=commit, repo_type="dataset")
            return _files_in(entries).get(name)

    def upload(self, files: Iterable[NewFile]) -> list[Any]:
        """Upload the content of large files, and return the operations of a commit.

        Raises:
            ShardError: The content of a file has another digest than the build lists.
            HubError: The Hub cannot be reached, or refuses.
        """
        from huggingface_hub import CommitOperationAdd

        files = list(files)
        with self._errors("upload to"), _without_bars():
            additions = []
            for file in files:
                with _reading(file.path):
                    additions.append(CommitOperationAdd(file.name, str(file.path)))
            _api().preupload_lfs_files(
                self.name, additions, repo_type="dataset", revision=self.branch
            )
        for file, addition in zip(files, additions, strict=True):
            if file.sha256 not in (None, addition.upload_info.sha256.hex()):
                raise ShardError(
                    f"{file.path} is damaged: its content is not what was written",
                    remedy=_BUILD_AGAIN,
                )
        return additions

    def commit(
        self, additions: Iterable[Any], removed: Iterable[str], *, parent: str, message: str
    ) -> str:
        """Commit uploaded files and removals if the head is still `parent`; return the new head.

        Raises:
            OutputBusy: The head is another commit.
            HubError: The Hub cannot be reached, or refuses.
        """
        from huggingface_hub import CommitOperationDelete

        operations = [*additions, *(CommitOperationDelete(name) for name in removed)]
        with self._errors("commit to"):
            found = _api().create_commit(
                self.name,
                operations,
                commit_message=message,
                repo_type="dataset",
                revision=self.branch,
                parent_commit=parent,
            )
        return str(found.oid)

    def _errors(self, action: str) -> Any:
        # A ValueError is what the library raises for a response that it does not understand.
        return hub_errors(action, f"the data set {self.name}", also=(ValueError,))


def is_hub_url(path: object) -> bool:
    """Return whether a path is the URL of a repository on the Hub."""
    return isinstance(path, str) and path.startswith("hf://")


def pin_revision(url: str) -> str:
    """Return the URL of the same folder at the commit of its revision: one request.

    Raises:
        ConfigError: The URL has another form than hf://datasets/org/name[@revision][/folder].
        HubError: The Hub cannot be reached, or has no such repository or revision.
    """
    repo, revision, folder = _parse(url)
    commit = revision
    if revision is None or not _COMMIT.fullmatch(revision):
        from huggingface_hub.errors import RevisionNotFoundError

        with hub_errors("read", f"the data set {repo}"):
            try:
                commit = _commit_of(repo, revision)
            except RevisionNotFoundError as error:
                raise HubError(
                    f"the Hub: the data set {repo} has no revision {revision!r}",
                    remedy="use an existing branch, tag or commit",
                ) from error
    return f"{HUB_PREFIX}{repo}@{commit}" + (f"/{folder}" if folder else "")


def is_pinned(url: str) -> bool:
    """Return whether a URL of the Hub names a commit, so that its files never change."""
    found = _URL.fullmatch(url)
    return found is not None and bool(_COMMIT.fullmatch(found["revision"] or ""))


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hide the progress bars of the library, unless the environment decides about them."""
    from huggingface_hub import constants
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise the error of a local file that cannot be read as a ShardError."""
    try:
        yield
    except OSError as error:
        raise ShardError(
            f"{path} cannot be read: {error.strerror or error}", remedy=_BUILD_AGAIN
        ) from error


def _parse(url: str) -> tuple[str, str | None, str]:
    """Return the repository, the revision and the folder of a URL."""
    found = _URL.fullmatch(url.rstrip("/"))
    if found is None:
        raise ConfigError(f"{url} is not the URL of a data set on the Hub", remedy=_FORM)
    revision = unquote(found["revision"]) if found["revision"] else None
    return found["repo"], revision, found["folder"] or ""


def _files_in(entries: Iterable[Any]) -> dict[str, HubFile]:
    return {
        entry.path: HubFile(entry.size, entry.blob_id, entry.lfs and entry.lfs.sha256)
        for entry in entries
        if hasattr(entry, "blob_id")  # not a folder
    }


def _commit_of(repo: str, revision: str | None) -> str:
    return str(_api().repo_info(repo, repo_type="dataset", revision=revision).sha)


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi()
