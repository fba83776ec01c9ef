"""The output of a build in an object store.

The build works in a local scratch folder, like a build in a local folder, and puts the shards of
each group when it is done. The commit has four steps:

1. put the other files, such as those of groups and the rejected records: their names contain
   digests of their content, so an object that the current manifest names is at most written with
   the same bytes;
2. write the manifest, on the condition that it is still missing, or still the one that is replaced:
   the store decides between builds, and the one that loses gets OutputBusy;
3. write the data card, unless another build has committed since: before the commit, the builds
   that lose would write theirs;
4. remove the files that only the replaced manifest names.

Nothing depends on a lock, a rename or a listing. What killed builds leave is removed by
`garbage.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from sftprep.config.build import OutputConfig
from sftprep.core.atomic_write import storage_errors
from sftprep.errors import (
    ManifestError,
    OutputBusy,
    OutputExists,
    StorageError,
    format_count,
    setting,
)
from sftprep.pipeline.output.contents import (
    FINAL_NAME,
    NOT_THE_SAME,
    card_notice,
    inside_build_error,
    user_files_error,
)
from sftprep.pipeline.output.scratch import ScratchOutput, claim_scratch, lost_shards
from sftprep.shards.group import files_of_group
from sftprep.shards.layout import (
    CARD_NAME,
    EVAL_FOLDER,
    LARGEST_MANIFEST,
    MANIFEST_NAME,
    is_finished_build,
    tokenizer_paths,
)
from sftprep.shards.manifest import Manifest, parse_manifest, read_manifest
from sftprep.shards.ownership import is_card
from sftprep.stores.folder import Mark, StoreFolder
from sftprep.stores.hub import NewFile

_ATTEMPTS = 5
"""How often the manifest is written while the store says that another write is in progress."""


class _Committed(NamedTuple):
    """The manifest of a finished build."""

    content: bytes
    mark: Mark
    manifest: Manifest


@dataclass(frozen=True, kw_only=True)
class OutputStore(ScratchOutput):
    """The output of a build in a store, with the interface of `OutputFolder`.

    Attributes:
        root: Its folder in the store.
        replaced: The build that was there at the start; None if there was none.
    """

    root: StoreFolder
    replaced: _Committed | None

    @property
    def batch(self) -> int:
        return max(1, len(self.waiting))  # all at once

    def send(self, files: list[NewFile]) -> None:
        self.root.put((file.path, file.name) for file in files)

    def commit(
        self, manifest: Manifest, evaluation: Manifest | None, card: bytes, *, keep_spill: bool
    ) -> StoreFolder:
        """Replace the previous build by the finished one; return its folder.

        Args:
            manifest: The manifest of the training build.
            evaluation: The manifest of the evaluation build, if there is one.
            card: The data card. It is not written if the folder has a README.md of a user.
            keep_spill: Whether to keep the spills in the scratch folder.

        Raises:
            ConfigError: A manifest is larger than the largest one that can be read.
            OutputBusy: Another build has committed since the start of this one.
            StorageError: The store cannot be written to.
        """
        with storage_errors(self.scratch.root):
            *files, (manifest_path, _) = self.scratch.stage(manifest, evaluation)
            content = manifest_path.read_bytes()
        previous = set() if self.replaced is None else _file_names(self.root, self.replaced)
        sent = self.find_sent()
        self.root.put((path, name) for path, name in files if name not in sent)
        if sent and (lost := (sent.keys() & {name for _, name in files}) - self.root.names()):
            raise lost_shards(self.root, lost)
        self._write_manifest(content)
        self._write_card(card, content)
        # Another build may have replaced this one already, and may use the files again.
        if (current := _read_committed(self.root)) and current.content == content:
            self.root.remove(previous - {name for _, name in files} - {MANIFEST_NAME})
        with storage_errors(self.scratch.root):
            self.scratch.clean(keep_spill=keep_spill)
        return self.root

    def _write_manifest(self, content: bytes) -> None:
        """Write the manifest if no other build has; this commits the build.

        Raises:
            OutputBusy: Another build has written one.
            StorageError: The store cannot be written to.
        """
        mark = self.replaced and self.replaced.mark
        for attempt in range(_ATTEMPTS):
            failure = None
            try:
                if mark is None:
                    is_written = self.root.create(MANIFEST_NAME, content)
                else:
                    is_written = self.root.replace(MANIFEST_NAME, content, mark)
            except StorageError as error:
                is_written, failure = False, error
            if is_written:
                return
            current = _read_object(self.root, MANIFEST_NAME)
            if current is not None and current[0] == content:
                return  # it was written, and the response was lost
            if failure is not None:
                raise failure
            if (current and current[1]) != mark:
                break
            time.sleep(0.1 * 2**attempt)
        raise OutputBusy(
            f"another build was committed to {self.root} while this one ran",
            remedy=f"look at it, then run this one again with {setting('overwrite', True)}",
        )

    def _write_card(self, card: bytes, manifest: bytes) -> None:
        """Write the data card, while the manifest is still that of this build.

        Of several builds that commit one after the other, the last one writes the card: each
        looks at the manifest after it has read the mark of the card that it replaces.

        Args:
            card: The data card.
            manifest: The content of the manifest.

        Raises:
            StorageError: The store cannot be written to.
        """
        for _ in range(_ATTEMPTS):
            found = _read_object(self.root, CARD_NAME)
            current = _read_object(self.root, MANIFEST_NAME)
            if current is None or current[0] != manifest:
                return
            if found is None:
                is_written = self.root.create(CARD_NAME, card)
            elif found[0] == card:
                return  # also where it was written, and the response was lost
            elif is_card(found[0]):
                is_written = self.root.replace(CARD_NAME, card, found[1])
            else:
                card_notice(self.root).log()
                return
            if is_written:
                return


@contextmanager
def claim_store(root: StoreFolder, settings: OutputConfig) -> Iterator[OutputStore]:
    """Claim an output folder in a store while the block runs.

    Args:
        root: The folder.
        settings: The settings of the output.

    Raises:
        ConfigError: The store does not decide between builds.
        OutputExists: It holds a finished build that may not be replaced, or files of a user, or it
            is in the folder of another build.
        OutputBusy: Another build on this machine works for the same output.
        StorageError: The folder cannot be written.
    """
    names = root.names()
    replaced = _read_committed(root) if MANIFEST_NAME in names else None
    if replaced is not None and not settings.overwrite:
        raise OutputExists(
            f"{root} holds a finished build of {format_count(replaced.manifest.rows, 'pack')},"
            f" {NOT_THE_SAME}",
            remedy=[
                f"replace it with {setting('overwrite', True)}",
                f"choose another {setting('output')}",
            ],
        )
    if replaced is None:
        _check_place(root, names)
    root.check_conditions()
    with claim_scratch(settings, root.url) as local:
        output = OutputStore(root=root, scratch=local, replaced=replaced)
        if sent := output.find_sent():  # a build that was killed has sent them
            output.forget(sent.keys() - root.names())
        yield output


def _check_place(root: StoreFolder, names: Iterable[str]) -> None:
    """Check that a new output folder is not in another build, and has no files of others.

    Args:
        root: The folder.
        names: The names of the objects in it.

    Raises:
        OutputExists: It is, or it has.
        StorageError: The store cannot be reached.
    """
    parent = root.parent
    while not parent.url.endswith("/"):  # of the bucket: "s3:/"
        if is_finished_build(str(parent)):
            raise inside_build_error(root, parent)
        parent = parent.parent
    others = sorted(name for name in names if not _is_left_by_build(name))
    if others:
        raise user_files_error(root, others)


def _is_left_by_build(name: str) -> bool:
    """Return whether the name of an object is one that a killed build may have left.

    `eval/manifest.json` is the manifest of a build of its own: that of evaluation records has its
    digest in the name.
    """
    is_hidden = "/." in f"/{name}"  # such as what checks of the store left
    is_final = FINAL_NAME.fullmatch(name) and name != f"{EVAL_FOLDER}/{MANIFEST_NAME}"
    return is_hidden or bool(is_final) or name == CARD_NAME


def _read_committed(root: StoreFolder) -> _Committed | None:
    """Return the build in a folder; None if there is none.

    Raises:
        OutputExists: The folder has a manifest that cannot be read.
    """
    found = _read_object(root, MANIFEST_NAME)
    if found is None:
        return None
    content, mark = found
    try:
        return _Committed(content, mark, parse_manifest(content, root))
    except ManifestError as error:
        raise OutputExists(
            f"{root} has a {MANIFEST_NAME} that is not that of a build ({error.message})",
            remedy=f"choose another {setting('output')}, or remove the file",
        ) from error


def _read_object(root: StoreFolder, name: str) -> tuple[bytes, Mark] | None:
    """Return the content and the mark of a file, of one moment; None if there is none.

    Raises:
        OutputBusy: It is replaced all the time.
    """
    for _ in range(_ATTEMPTS):
        try:
            mark = root.mark(name)
            content = root.read_range(name, 0, min(mark.size, LARGEST_MANIFEST) + 1)
            if root.mark(name) == mark:
                return content, mark
        except FileNotFoundError:
            return None
    raise OutputBusy(f"{root}/{name} keeps changing", remedy="run it again later")


def _file_names(root: StoreFolder, committed: _Committed) -> set[str]:
    """Return the names of the files of a finished build, without its manifest.

    A group whose file is damaged is left out: what it names is not known.
    """
    names = build_names("", committed.manifest, skip_damaged=True)
    if committed.manifest.eval:
        try:
            evaluation = read_manifest(str(root / EVAL_FOLDER))
        except ManifestError:
            return names
        names |= build_names(f"{EVAL_FOLDER}/", evaluation, skip_damaged=True)
        names.add(f"{EVAL_FOLDER}/{committed.manifest.eval.get('manifest')}")
    return names


def build_names(prefix: str, manifest: Manifest, *, skip_damaged: bool = False) -> set[str]:
    """Return the names of the files of a build, without its manifest.

    Args:
        prefix: The path of the build in its output folder: "", or "eval/".
        manifest: Its manifest.
        skip_damaged: Whether to leave out groups whose file cannot be read.

    Raises:
        ManifestError: The file of a group cannot be read.
    """
    names = {*tokenizer_paths(manifest.tokenizer)}
    for number, entry in enumerate(manifest.groups):
        try:
            group = manifest.read_group(number)
        except ManifestError:
            if not skip_damaged:
                raise
            continue
        names.update(f"{prefix}{name}" for name in files_of_group(entry, group))
    return names
