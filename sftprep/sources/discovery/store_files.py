"""The data files that a URL of an object store names: one, those of a pattern, or of a folder."""

from __future__ import annotations

import logging

from sftprep.config.validation import TextUnit, printable
from sftprep.errors import FormatError, InputNotFound, InputUnreadable, setting
from sftprep.shards.layout import MANIFEST_NAME, SHARD_FOLDER
from sftprep.sources.discovery.file_types import SUFFIXES, is_data, is_metadata, kind_of
from sftprep.sources.discovery.hub import FoundFile
from sftprep.sources.discovery.hub_splits import HubConfig, files_of_splits
from sftprep.sources.discovery.paths import build_as_input, input_in_output
from sftprep.sources.discovery.saved import choose_split
from sftprep.stores.folder import StoredFile, list_files

_log = logging.getLogger(__name__)


def store_files(
    url: str,
    split: str | None = None,
    *,
    output: str | None = None,
    text_unit: TextUnit | None = None,
) -> list[FoundFile]:
    """Return the files that a URL names, sorted.

    Of a folder, the data files are read, and the others are logged. What a pattern matches, or what
    is named, must be of a kind that is read.

    Args:
        url: The URL of an object, a pattern, or a folder.
        split: As for `find_files`.
        output: The folder or URL that is written to; nothing in it is read.
        text_unit: As for `find_files`.

    Raises:
        InputNotFound: The URL matches nothing.
        FormatError: A file is of a kind that is not read, or the folder is a build.
        InputUnreadable: The store does not say when a file changes.
        ConfigError: The protocol is unknown, no file belongs to the split, or all files are in the
            output folder.
        StorageError: The store cannot be reached.
    """
    url = url.rstrip("/")
    listed = list_files(url)
    files = [file for file in listed if not f"{file.url}/".startswith(f"{output}/")]
    if listed and not files:
        raise input_in_output(url)
    if any(file.url.startswith(f"{url}/") for file in files):
        files = _select_data(url, files, split, text_unit)
    else:
        for file in files:
            if kind_of(file.url, text_unit) is None:
                raise FormatError(
                    f"{file.url} is not a kind of file that is read: {', '.join(SUFFIXES)}",
                    remedy=f"convert it, or read its lines with {setting('format', 'text')}",
                )
    if not files:
        raise InputNotFound(
            f"{url} does not exist, or has no {', '.join(SUFFIXES)} file",
            remedy="check the URL; patterns must be quoted: 's3://bucket/data/*.jsonl'",
        )
    for file in files:
        if not file.mark.tag:
            raise InputUnreadable(
                f"{file.url} is in a store that does not say when a file changes (ETag)",
                remedy="download the file, and use its path",
            )
    return [FoundFile(file.url, file.url, file.mark) for file in files]


def _select_data(
    url: str, files: list[StoredFile], split: str | None, text_unit: TextUnit | None
) -> list[StoredFile]:
    """Return the data files of a split in a folder, and log the others.

    Raises:
        FormatError: The folder is a build.
        ConfigError: No file belongs to the split.
    """
    paths = {file.url.removeprefix(f"{url}/"): file for file in files}
    builds = [
        path.removesuffix(MANIFEST_NAME)
        for path in paths
        if f"/{path}".endswith(f"/{MANIFEST_NAME}") and _is_build(path, paths)
    ]
    if "" in builds:
        raise build_as_input(url, url, f"{url}/{SHARD_FOLDER}")
    wanted = {
        path: file
        for path, file in paths.items()
        if is_data(path, text_unit) and not path.startswith(tuple(builds))
    }
    skipped = [paths[path].url for path in paths.keys() - wanted if not is_metadata(path)]
    if skipped:
        more = f" and {len(skipped) - 5:,} more" if len(skipped) > 5 else ""
        shown = ", ".join(map(printable, sorted(skipped)[:5]))
        _log.warning("not read: %s%s (hidden, in a build, or of another kind)", shown, more)
    if split is None:
        return list(wanted.values())
    splits = files_of_splits(HubConfig("default", None), list(wanted), one_kind=False)
    chosen = splits[choose_split(list(splits), split, url)]
    return [file for path, file in wanted.items() if path in set(chosen)]


def _is_build(manifest: str, paths: dict[str, StoredFile]) -> bool:
    """Return whether shards are alongside a manifest."""
    shards = f"{manifest.removesuffix(MANIFEST_NAME)}shards/"
    return any(path.startswith(shards) for path in paths)
