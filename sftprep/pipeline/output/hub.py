"""The output of a build in a data set repository on the Hub.

The content of files is uploaded without a commit, and then committed. Each commit names the one
before it as its parent, so the Hub refuses it if another program has committed meanwhile:

1. commit the files that the repository does not have, at most 100 at a time: no manifest names them
   yet. A build does so whenever its finished groups have 100 shards;
2. check in the listing of the last of these commits that all files are there, and that the manifest
   is still the one that is replaced;
3. commit the manifest, with the files that replace others, and with the removal of the files of
   builds that it does not name: those of the replaced build, and what pushes that were killed left.

A reader uses one commit, so it sees the old build or the new one. A push that was killed or refused
leaves files that no manifest names; the next push does not upload them again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

from sftprep.config.build import OutputConfig
from sftprep.core.atomic_write import storage_errors
from sftprep.errors import (
    ConfigError,
    HubError,
    ManifestError,
    OutputBusy,
    OutputExists,
    SftprepError,
    format_count,
    setting,
)
from sftprep.pipeline.output.contents import FINAL_NAME, card_notice
from sftprep.pipeline.output.scratch import ScratchOutput, claim_scratch, lost_shards
from sftprep.shards.layout import CARD_NAME, EVAL_FOLDER, LARGEST_MANIFEST, MANIFEST_NAME
from sftprep.shards.manifest import Manifest, parse_manifest
from sftprep.shards.ownership import is_card
from sftprep.stores.folder import StoreFolder
from sftprep.stores.hub import HubFile, HubRepository, NewFile

_FILES_PER_COMMIT = 100
_FILES_PER_UPLOAD = 8
"""Files of one request, after which progress is reported."""
_ATTEMPTS = 5
"""How often shards are committed while other programs commit too."""
_FILES_PER_FOLDER = 10_000
_FILES_PER_REPOSITORY = 100_000

_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class PushReport:
    """The result of a push.

    Attributes:
        url: The URL of the build at its commit.
        commit: The commit.
        files: The number of files that were committed; 0 if the repository was up to date.
        bytes: Their size.
        keeps_readme: Whether the repository has a README.md of its own, which was kept.
    """

    url: str
    commit: str
    files: int
    bytes: int
    keeps_readme: bool


@dataclass(frozen=True, kw_only=True)
class OutputHub(ScratchOutput):
    """The output of a build on the Hub, with the interface of `OutputFolder`.

    Attributes:
        repository: The repository.
        replaced: The manifest that was there at the start; None if there was none.
    """

    repository: HubRepository
    replaced: HubFile | None

    @property
    def batch(self) -> int:
        return _FILES_PER_COMMIT

    def send(self, files: list[NewFile]) -> None:
        additions = _Upload(self.repository, 0).run(files)
        for attempts_left in reversed(range(_ATTEMPTS)):
            head = self.repository.head() or ""
            try:
                self.repository.commit(additions, (), parent=head, message="Shards of a build")
            except OutputBusy:  # another commit between the two requests, maybe of a README
                if not attempts_left:
                    raise
            else:
                return

    def commit(
        self, manifest: Manifest, evaluation: Manifest | None, card: bytes, *, keep_spill: bool
    ) -> StoreFolder:
        """Replace the previous build by the finished one; return its folder at the new commit.

        Args:
            manifest: The manifest of the training build.
            evaluation: The manifest of the evaluation build, if there is one.
            card: The data card. It is not written if the repository has a README.md of a user.
            keep_spill: Whether to keep the spills in the scratch folder.

        Raises:
            ConfigError: A manifest is larger than the largest one that can be read, or the build
                has too many files for the Hub.
            OutputBusy: Another program has committed since the start of this one.
            HubError: The Hub cannot be reached, or refuses.
        """
        with storage_errors(self.scratch.root):
            staged = self.scratch.stage(manifest, evaluation)
            staged.insert(0, self.scratch.stage_card(card))
        sent = self.find_sent()
        *files, last = (NewFile(path, name) for path, name in staged if name not in sent)
        used = {name: sent[name] for _, name in staged if name in sent}
        message = f"Build of {format_count(manifest.rows, 'pack')}"
        pushed = publish(self.repository, self.replaced, files, last, message=message, sent=used)
        if pushed.keeps_readme:
            card_notice(self.repository).log()
        with storage_errors(self.scratch.root):
            self.scratch.clean(keep_spill=keep_spill)
        return StoreFolder(pushed.url)


@contextmanager
def claim_repository(repository: HubRepository, settings: OutputConfig) -> Iterator[OutputHub]:
    """Claim a repository for a build while the block runs; a missing one is created, private.

    Args:
        repository: The repository.
        settings: The settings of the output.

    Raises:
        OutputExists: It holds a finished build that may not be replaced.
        OutputBusy: Another build on this machine works for the same output.
        HubError: The Hub cannot be reached, or refuses.
    """
    head = repository.head() or repository.create(private=True)
    repository.check_writable()
    replaced = replaceable_manifest(repository, head, overwrite=settings.overwrite)
    with claim_scratch(settings, str(repository)) as local:
        output = OutputHub(repository=repository, scratch=local, replaced=replaced)
        if sent := output.find_sent():  # a build that was killed has sent them
            output.forget(_lost_names(sent, repository.list_files(head)))
        yield output


def replaceable_manifest(
    repository: HubRepository, head: str, *, overwrite: bool, same: NewFile | None = None
) -> HubFile | None:
    """Return the manifest in a repository, which may be replaced; None if there is none.

    Args:
        repository: The repository.
        head: Its head.
        overwrite: Whether another finished build may be replaced.
        same: A manifest that may always be there.

    Raises:
        OutputExists: It holds another finished build, or a `manifest.json` of something else.
    """
    found = repository.find_file(head, MANIFEST_NAME)
    if found is None or (same is not None and same.is_equal(found)):
        return found
    folder = StoreFolder(repository.at(head))
    content = folder.read_range(MANIFEST_NAME, 0, LARGEST_MANIFEST + 1)
    try:
        rows = parse_manifest(content, folder).rows
    except ManifestError as error:
        raise OutputExists(
            f"{repository} has a {MANIFEST_NAME} that is not that of a build ({error.message})",
            remedy="choose another repository, or remove the file",
        ) from error
    if not overwrite:
        raise OutputExists(
            f"{repository} holds another finished build, of {format_count(rows, 'pack')}",
            remedy=[f"replace it with {setting('overwrite', True)}", "choose another repository"],
        )
    return found


def publish(
    repository: HubRepository,
    replaced: HubFile | None,
    files: Sequence[NewFile],
    manifest: NewFile,
    *,
    message: str,
    sent: Mapping[str, str] = MappingProxyType({}),
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> PushReport:
    """Upload and commit the files of a build, its manifest last; see the top of the module.

    Args:
        repository: The repository.
        replaced: The manifest that it must still have; None if it must have none.
        files: All other files of the build.
        manifest: The manifest.
        message: The message of the commits.
        sent: The SHA-256 of its shards that were committed before, by their names.
        progress: Called with the name of the stage, the bytes uploaded, and those in total.

    Raises:
        ConfigError: The build has too many files for the Hub.
        OutputBusy: Another program has committed meanwhile.
        ShardError: A local file is damaged.
        HubError: The Hub cannot be reached, or refuses.
    """
    _check_number([*(file.name for file in files), *sent])
    head = repository.head()
    if head is None:
        raise HubError(
            f"the Hub: the data set {repository.name} does not exist any more", remedy="push again"
        )
    found = repository.list_files(head)
    _check_replaced(repository, found, replaced)
    keeps_readme = _has_other_readme(repository, head, found)
    files = [file for file in files if not (keeps_readme and file.name == CARD_NAME)]
    new = [file for file in files if file.name not in found and file.name != CARD_NAME]
    added = {file.name for file in new}
    last = [
        file for file in (*files, manifest) if file.name not in added and not _is_there(file, found)
    ]
    upload = _Upload(repository, sum(file.size for file in (*new, *last)), progress)
    for number, batch in enumerate(_batches(new, _FILES_PER_COMMIT)):
        end = number * _FILES_PER_COMMIT + len(batch)
        text = f"{message}: files up to {end:,} of {len(new):,}"
        head = repository.commit(upload.run(batch), (), parent=head, message=text)
    if new:
        found = repository.list_files(head)
        _check_replaced(repository, found, replaced)
        _check_committed(repository, found, new)
    if lost := _lost_names(sent, found):
        raise lost_shards(repository, lost)
    removed = _obsolete_names(found, {*(file.name for file in (*files, manifest)), *sent})
    now = removed[: max(_FILES_PER_COMMIT - len(last), 0)]
    if last or now:
        head = _commit_manifest(repository, upload, last, now, head, message)
    for names in _batches(removed[len(now) :], _FILES_PER_COMMIT):
        head = repository.commit((), names, parent=head, message=f"{message}: removals")
    return PushReport(repository.at(head), head, len(new) + len(last), upload.total, keeps_readme)


def _commit_manifest(
    repository: HubRepository,
    upload: _Upload,
    files: list[NewFile],
    removed: list[str],
    head: str,
    message: str,
) -> str:
    """Commit the files of the last step, the manifest being one of them; return the new head."""
    additions = upload.run(files)
    try:
        return repository.commit(additions, removed, parent=head, message=message)
    except SftprepError:
        # It may have been committed, and only the response was lost.
        with suppress(SftprepError):
            current = repository.head()
            found = repository.list_files(current or head)
            if current != head and files and all(_is_there(file, found) for file in files):
                return str(current)
        raise


class _Upload:
    """The uploads of a push, with their progress.

    Args:
        repository: The repository.
        total: The bytes of all files.
        progress: The progress callback.
    """

    def __init__(
        self,
        repository: HubRepository,
        total: int,
        progress: Callable[[str, int, int], None] = lambda *_: None,
    ) -> None:
        self.total = total
        self._repository, self._progress = repository, progress
        self._done = 0  # bytes

    def run(self, files: Sequence[NewFile]) -> list[object]:
        """Upload files, and return the operations that commit them."""
        additions: list[object] = []
        for batch in _batches(files, _FILES_PER_UPLOAD):
            additions += self._repository.upload(batch)
            self._done += sum(file.size for file in batch)
            self._progress("upload", self._done, self.total)
        return additions


def _lost_names(sent: Mapping[str, str], found: dict[str, HubFile]) -> list[str]:
    """Return the shards that were sent and that a repository does not have any more."""
    return [
        name
        for name, digest in sent.items()
        if name not in found or found[name].sha256 not in (digest, None)
    ]


def _is_there(file: NewFile, found: dict[str, HubFile]) -> bool:
    return file.name in found and file.is_equal(found[file.name])


def _check_number(names: Iterable[str]) -> None:
    """Raise ConfigError for more files than the Hub recommends."""
    counts = Counter(name.rpartition("/")[0] for name in names)
    folder, most = max(counts.items(), key=lambda item: item[1], default=("", 0))
    total = counts.total()
    if most > _FILES_PER_FOLDER or total > _FILES_PER_REPOSITORY:
        raise ConfigError(
            f"the build has {total:,} files, {most:,} of them in {folder}; a repository on the Hub"
            f" should have at most {_FILES_PER_REPOSITORY:,}, of them {_FILES_PER_FOLDER:,} in a"
            " folder",
            remedy=f"raise {setting('group_bytes')} and {setting('shard_tokens')}",
        )


def _check_replaced(
    repository: HubRepository, found: dict[str, HubFile], replaced: HubFile | None
) -> None:
    """Raise OutputBusy if the manifest in the repository is not the one that is replaced."""
    if found.get(MANIFEST_NAME) != replaced:
        raise OutputBusy(
            f"another build was committed to {repository} while this one ran",
            remedy=f"look at it, then run this one again with {setting('overwrite', True)}",
        )


def _check_committed(
    repository: HubRepository, found: dict[str, HubFile], files: list[NewFile]
) -> None:
    """Raise HubError if the repository does not have the files that were committed."""
    missing = [file.name for file in files if not _is_there(file, found)]
    if missing:
        raise HubError(
            f"the Hub: the data set {repository.name} lacks {missing[0]} after its commit",
            remedy="look for it in .gitignore of the repository, then run the same command again",
        )


def _obsolete_names(found: dict[str, HubFile], kept: set[str]) -> list[str]:
    """Return the files of builds in a repository that the new manifest does not name."""
    # With a manifest of this name, the folder is a separate build that a user made.
    has_own_eval = f"{EVAL_FOLDER}/{MANIFEST_NAME}" in found
    return sorted(
        name
        for name in found.keys() - kept
        if FINAL_NAME.fullmatch(name) and not (has_own_eval and name.startswith(f"{EVAL_FOLDER}/"))
    )


def _has_other_readme(repository: HubRepository, head: str, found: dict[str, HubFile]) -> bool:
    """Return whether a repository has a README that no build wrote."""
    if CARD_NAME not in found:
        return False
    folder = StoreFolder(repository.at(head))
    return not is_card(folder.read_range(CARD_NAME, 0, LARGEST_MANIFEST + 1))


def _batches(items: Sequence[_Item], size: int) -> Iterator[list[_Item]]:
    return (list(items[start : start + size]) for start in range(0, len(items), size))
