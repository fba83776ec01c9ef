"""Data sets on the Hugging Face Hub: the files of a split.

They are downloaded into the Hub's own cache.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from sftprep.config.cache_location import cache_dir
from sftprep.core.disk_cache import read_entry, write_entry
from sftprep.core.hashing import digest
from sftprep.errors import ConfigError, FormatError, HubError, InputNotFound, first_line, setting
from sftprep.shards.layout import MANIFEST_NAME, SHARD_FOLDER
from sftprep.sources.discovery.file_types import is_data, kind_of
from sftprep.sources.discovery.hub_splits import choose_config, files_of_splits, glob_matches
from sftprep.sources.discovery.paths import build_as_input
from sftprep.sources.discovery.saved import choose_split
from sftprep.stores.folder import Mark
from sftprep.stores.hub import HUB_PREFIX
from sftprep.stores.hub_error_conversion import is_hub_error

_NAME = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^:/]+))?(?::(?P<config>[^/]+))?(?:/(?P<rest>.+))?",
    re.ASCII,
)
_DOWNLOADS = 8


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file of a data set.

    Attributes:
        path: The path of the local copy.
        name: The name in the manifest, which contains the commit; for a local file, its path.
        mark: The mark of an object in a store, whose `path` is a URL; None for a file.
    """

    path: str
    name: str
    mark: Mark | None = None


@dataclass(frozen=True, slots=True)
class _HubRequest:
    """The parts of a name.

    Attributes:
        repo: The repository, as org/name.
        revision: A branch, a tag or a commit.
        config: The configuration.
        rest: A split, or the path of a file or a pattern in the repository.
    """

    repo: str
    revision: str | None
    config: str | None
    rest: str | None


def is_hub_name(name: str) -> bool:
    """Return whether a name refers to a data set on the Hub.

    It starts with hf://, or has the form org/name and is not a local path.
    """
    return name.startswith("hf://") or (_has_hub_form(name) and not _is_local(name))


def reject_revision_of_path(name: str, revision: str | None) -> None:
    """Raise ConfigError for the revision of a local path named like a data set."""
    if revision is not None and _has_hub_form(name):
        raise ConfigError(
            f"{setting('revision', revision)} is for the Hub, but {name} is a local path",
            remedy=[
                f"write hf://datasets/{name} for the data set on the Hub",
                f"for the local path, leave out {setting('revision')}",
            ],
        )


def _has_hub_form(name: str) -> bool:
    if any(c in name for c in "*?[~\\") or kind_of(name) is not None:
        return False
    found = _NAME.fullmatch(name)
    return (
        found is not None
        and found["rest"] is None
        and not name.startswith(".")
        and ".." not in name
    )


def _is_local(name: str) -> bool:
    """Return whether a local path has this name.

    This includes inaccessible paths and broken links.
    """
    first = name.partition("/")[0]
    if os.path.islink(first) and not os.path.exists(first):
        return True
    try:
        os.lstat(name)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError):
        return True
    return True


def hub_files(
    name: str, *, config_name: str | None, split: str | None, revision: str | None
) -> list[FoundFile]:
    """Return the files of a split, sorted, and download the missing ones.

    Files in the cache are not downloaded again. The files of a split are determined as in
    `datasets`: by `configs` in the README, otherwise by the names of the files.

    Args:
        name: hf://datasets/org/name[@revision][:config][/split or file], or
            org/name[@revision][:config]. It takes precedence over the other arguments.
        config_name: The requested configuration.
        split: The requested split.
        revision: The requested branch, tag or commit.

    Raises:
        HubError: The network or the permission is missing.
        InputNotFound: The data set, revision or file does not exist.
        ConfigError: A split or a configuration must be chosen, or the requested one does not
            exist.
        FormatError: No file can be read.
    """
    request = _parse_name(name)
    revision = request.revision or revision
    with _convert_hub_errors(request.repo, revision, name=name):
        commit, paths = _list_files(request.repo, revision)
        wanted = _select_files(
            request,
            paths,
            config_name,
            split,
            lambda path: _download(request.repo, commit, [path])[0],
        )
        local = _download(request.repo, commit, wanted)
    label = f"{HUB_PREFIX}{request.repo}@{commit}"
    return [
        FoundFile(path, f"{label}/{remote}") for path, remote in zip(local, wanted, strict=True)
    ]


def _parse_name(name: str) -> _HubRequest:
    if name.startswith("hf://") and not name.startswith(HUB_PREFIX):
        raise ConfigError(f"{name} is not a data set", remedy=f"write {HUB_PREFIX}org/name")
    found = _NAME.fullmatch(name.removeprefix(HUB_PREFIX))
    if found is None:
        raise ConfigError(
            f"{name} is not the name of a data set on the Hub",
            remedy=f"write {HUB_PREFIX}org/name[@revision][:config][/split]",
        )
    revision = found["revision"]
    return _HubRequest(
        found["repo"], unquote(revision) if revision else None, found["config"], found["rest"]
    )


def _list_files(repo: str, revision: str | None) -> tuple[str, list[str]]:
    """Return the commit of a revision, and the paths of all its files.

    In offline mode, the result of the last request is returned.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    # The Hub's own cache knows only the files that were downloaded, so that an incomplete download
    # would be taken for the whole data set. Hence a list of our own.
    kept = cache_dir() / "hub" / f"{digest(constants.ENDPOINT, repo, revision)[:32]}.json"
    try:
        info = HfApi().dataset_info(repo, revision=revision)
    except OfflineModeIsEnabled:
        entry = read_entry(kept)
        if entry is None:
            raise
        return str(entry[0]["commit"]), list(entry[0]["paths"])
    commit, paths = str(info.sha), [file.rfilename for file in info.siblings or []]
    write_entry(kept, {"commit": commit, "paths": paths})
    return commit, paths


def _select_files(
    request: _HubRequest,
    paths: list[str],
    config_name: str | None,
    split: str | None,
    fetch: Callable[[str], str],
) -> list[str]:
    """Return the paths of the requested files, sorted.

    Args:
        request: The parts of the name.
        paths: The paths of all files of the revision.
        config_name: The requested configuration, unless the name has one.
        split: The requested split, unless the name has one.
        fetch: Downloads a file and returns its local path.
    """
    where = f"the data set {request.repo}"
    rest = request.rest
    # 1. The name contains a file or a pattern.
    if rest is not None and ("/" in rest or kind_of(rest) or "*" in rest):
        found = sorted(path for path in paths if glob_matches(rest, path))
        if not found:
            raise InputNotFound(
                f"{where} has no file {rest}", remedy="look at its files on the Hub"
            )
        if any(kind_of(path) is None for path in found):
            raise FormatError(
                f"{rest} of {where} is not a kind of file that is read",
                remedy="use a narrower pattern",
            )
        return found
    # 2. Otherwise the README and the names of the files determine the files of the split.
    if MANIFEST_NAME in paths and any(path.startswith(f"{SHARD_FOLDER}/") for path in paths):
        url = f"{HUB_PREFIX}{request.repo}"
        raise build_as_input(where, url, f"{url}/{SHARD_FOLDER}/**/*.arrow")
    data = [path for path in paths if is_data(path)]
    if not data:
        suffixes = sorted(
            {os.path.splitext(path)[1] for path in paths if not path.startswith(".")} - {""}
        )
        raise FormatError(
            f"{where} has no file that can be read here; it has {', '.join(suffixes) or 'none'}",
            remedy=[
                f"use {setting('revision', 'refs/convert/parquet')}, which the Hub creates for most"
                " data sets",
                "load it with `datasets` and pass the loaded data set instead of its name",
            ],
        )
    readme = (
        Path(fetch("README.md")).read_text(encoding="utf-8", errors="replace")
        if "README.md" in paths
        else ""
    )
    config = choose_config(readme, data, request.config or config_name, where)
    splits = files_of_splits(config, data)
    return sorted(splits[choose_split(list(splits), rest or split, where)])


def _download(repo: str, commit: str, paths: list[str]) -> list[str]:
    from huggingface_hub import hf_hub_download

    # In parallel, because small files cost mostly latency.
    with ThreadPoolExecutor(_DOWNLOADS) as pool:
        return list(
            pool.map(
                lambda path: str(hf_hub_download(repo, path, repo_type="dataset", revision=commit)),
                paths,
            )
        )


@contextmanager
def _convert_hub_errors(repo: str, revision: str | None, *, name: str) -> Iterator[None]:
    """Raise errors of the Hub's library in the enclosed code as errors of sftprep.

    Args:
        repo: The repository.
        revision: The requested revision.
        name: What the user wrote: it may have been meant as a path.
    """
    from huggingface_hub import errors

    where = f"the data set {repo} on the Hub"
    not_a_path = "" if name.startswith(HUB_PREFIX) else f"{name} is not a local path, and "
    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(
            f"{where} is gated, so that its owner must grant access",
            remedy=f"request access on the page of {repo}, then log in: hf auth login",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputNotFound(
            f"{not_a_path}the data set {repo} on the Hub does not exist or is not accessible",
            remedy="check the name; if the data set is private, log in: hf auth login",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputNotFound(
            f"{where} has no revision {revision!r}",
            remedy="use an existing branch, tag or commit",
        ) from error
    except errors.HFValidationError as error:
        raise ConfigError(
            f"{repo} cannot be the name of a data set: {error}", remedy="write org/name"
        ) from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise HubError(
            f"{not_a_path}{where} is not in the cache, and the Hub cannot be reached:"
            f" {first_line(error, 200)}",
            remedy="connect to the network (and unset HF_HUB_OFFLINE), or use a path",
        ) from error
    except Exception as error:
        if not (isinstance(error, OSError) or is_hub_error(error)):
            raise
        raise HubError(
            f"{not_a_path}{where} could not be read: {type(error).__name__}:"
            f" {first_line(error, 200)}",
            remedy="check the name and the network, and try again",
        ) from error
