"""Data sets on the Hugging Face Hub: which of their files hold a split, fetched into the Hub's own
cache."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from sftprep.config.cache_location import cache_dir
from sftprep.core.disk_cache import read_entry, write_entry
from sftprep.core.hashing import digest
from sftprep.errors import ConfigError, FormatError, HubError, InputNotFound
from sftprep.sources.discovery.file_types import is_data, kind_of
from sftprep.sources.discovery.hub_splits import choose_config, files_of_splits, glob_matches
from sftprep.sources.discovery.saved import choose_split

_PREFIX = "hf://datasets/"
_NAME = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^:/]+))?(?::(?P<config>[^/]+))?(?:/(?P<rest>.+))?",
    re.ASCII,
)
_DOWNLOADS = 8


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a data set: where it is here, and what to call it, with the commit that it is
    of."""

    path: str
    name: str


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a name asks for. rest: a split, or the path of a file (or a pattern) in the
    repository."""

    repo: str
    revision: str | None
    config: str | None
    rest: str | None


def is_hub_name(name: str) -> bool:
    """Whether a name is of a data set on the Hub: hf://datasets/org/name..., or org/name where that
    is no path."""
    if name.startswith("hf://"):
        return True
    if _is_local(name) or any(c in name for c in "*?[~\\") or kind_of(name) is not None:
        return False
    found = _NAME.fullmatch(name)
    return (
        found is not None
        and found["rest"] is None
        and not name.startswith(".")
        and ".." not in name
    )


def _is_local(name: str) -> bool:
    """Whether something local has this name, also what cannot be accessed or is a broken link."""
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
) -> list[HubFile]:
    """The files of a split, sorted, downloaded where they are not in the cache yet.

    name: hf://datasets/org/name[@revision][:config][/split or file], or
    org/name[@revision][:config]; what it says wins over the other arguments. Which files are a
    split's is as `datasets` has it: by the README's `configs`, else by their names. Raises HubError
    (no network, no permission), InputNotFound (no such data set, revision or file), ConfigError (a
    split or a configuration to choose), FormatError (no file that can be read).
    """
    asked = _parsed(name)
    revision = asked.revision or revision
    with _explained(asked.repo, revision, written=name):
        commit, paths = _listing(asked.repo, revision)
        wanted = _wanted(
            asked, paths, config_name, split, lambda path: _fetched(asked.repo, commit, [path])[0]
        )
        local = _fetched(asked.repo, commit, wanted)
    label = f"{_PREFIX}{asked.repo}@{commit}"
    return [HubFile(path, f"{label}/{remote}") for path, remote in zip(local, wanted, strict=True)]


def _parsed(name: str) -> _Asked:
    if name.startswith("hf://") and not name.startswith(_PREFIX):
        raise ConfigError(f"{name} is no data set", remedy=f"write {_PREFIX}org/name")
    found = _NAME.fullmatch(name.removeprefix(_PREFIX))
    if found is None:
        raise ConfigError(
            f"{name} names no data set on the Hub",
            remedy=f"write {_PREFIX}org/name[@revision][:config][/split]",
        )
    revision = found["revision"]
    return _Asked(
        found["repo"], unquote(revision) if revision else None, found["config"], found["rest"]
    )


def _listing(repo: str, revision: str | None) -> tuple[str, list[str]]:
    """The commit that a revision is, and all the files that it has; as it was last, where the Hub
    is not to be asked."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    # The Hub's own cache knows only of files that were fetched: half a data set would pass for all
    # of it.
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


def _wanted(
    asked: _Asked,
    paths: list[str],
    config_name: str | None,
    split: str | None,
    fetch: Callable[[str], str],
) -> list[str]:
    """The files that are asked for, sorted."""
    where = f"the data set {asked.repo}"
    if asked.rest is not None and ("/" in asked.rest or kind_of(asked.rest) or "*" in asked.rest):
        found = sorted(path for path in paths if glob_matches(asked.rest, path))
        if not found:
            raise InputNotFound(
                f"{where} has no file {asked.rest}", remedy="look at its files on the Hub"
            )
        if any(kind_of(path) is None for path in found):
            raise FormatError(
                f"{asked.rest} of {where} is no kind of file that is read",
                remedy="narrow the pattern",
            )
        return found
    data = [path for path in paths if is_data(path)]
    if not data:
        others = sorted(
            {os.path.splitext(path)[1] for path in paths if not path.startswith(".")} - {""}
        )
        raise FormatError(
            f"{where} has no file that can be read here; it has {', '.join(others) or 'none'}",
            remedy=(
                "try --revision refs/convert/parquet, which the Hub makes of most data sets; or"
                " load it with `datasets`, and give what that loads to sftprep.build"
            ),
        )
    readme = (
        Path(fetch("README.md")).read_text(encoding="utf-8", errors="replace")
        if "README.md" in paths
        else ""
    )
    config = choose_config(readme, data, asked.config or config_name, where)
    splits = files_of_splits(config, data)
    return sorted(splits[choose_split(list(splits), asked.rest or split, where)])


def _fetched(repo: str, commit: str, paths: list[str]) -> list[str]:
    from huggingface_hub import hf_hub_download

    with ThreadPoolExecutor(_DOWNLOADS) as pool:
        return list(
            pool.map(
                lambda path: str(hf_hub_download(repo, path, repo_type="dataset", revision=commit)),
                paths,
            )
        )


@contextmanager
def _explained(repo: str, revision: str | None, *, written: str) -> Iterator[None]:
    """Turn what the Hub's library raises into our errors."""
    from huggingface_hub import errors

    where = f"the data set {repo} on the Hub"
    no_path = "" if written.startswith(_PREFIX) else f"{written} is no path here, and "
    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(
            f"{where} is gated: its owner gives access",
            remedy=f"ask for access on the page of {repo}, then log in: hf auth login",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputNotFound(
            f"{no_path}there is no data set {repo} on the Hub that you may read",
            remedy="check the name; log in (hf auth login) where it is private",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputNotFound(
            f"{where} has no revision {revision!r}",
            remedy="give a branch, a tag or a commit that it has",
        ) from error
    except errors.HFValidationError as error:
        raise ConfigError(
            f"{repo} cannot be the name of a data set: {error}", remedy="write org/name"
        ) from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise HubError(
            f"{no_path}{where} is not in the cache, and the Hub cannot be asked:"
            f" {_first_line(error)}",
            remedy="connect to the network (and unset HF_HUB_OFFLINE), or give a path",
        ) from error
    except Exception as error:
        if not _is_of_network(error):
            raise
        raise HubError(
            f"{no_path}{where} could not be read: {type(error).__name__}: {_first_line(error)}",
            remedy="check the name and the network, and try again",
        ) from error


def _is_of_network(error: Any) -> bool:
    # The library's HTTP client is its own affair: it has been requests, httpx and httpx2.
    modules = [kind.__module__ for kind in type(error).__mro__]
    return isinstance(error, OSError) or any(
        m.startswith(("http", "requests", "huggingface_hub", "hf_xet")) for m in modules
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
