"""Properties of paths: their kind, and whether they belong to a build.

A path that cannot be examined is an error. (`os.path.isdir` and similar functions return False for
it, so that its records would be missing without notice.)
"""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

from sftprep.config.validation import is_url
from sftprep.errors import ConfigError, FormatError, InputUnreadable, setting
from sftprep.shards.layout import (
    GROUP_FOLDER,
    KEY_PATTERN,
    SHARD_FOLDER,
    WORK_FOLDER,
    has_group,
    has_work_folder,
    is_build_folder,
    manifest_file,
)
from sftprep.shards.ownership import is_shard
from sftprep.shards.schema import SHARD_NAME
from sftprep.sources.readers.lines import convert_os_errors

_NOT_FOUND = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
"""Error numbers for a path that does not exist."""


def work_folder_of(path: str) -> Path | None:
    """Return the work folder of a build at or above a path, or None.

    Links are followed.
    """
    # The real path, because a link from elsewhere may lead into the folder.
    real = Path(os.path.realpath(path))
    for folder in (real, *real.parents):
        with convert_os_errors(str(folder)):
            if folder.name == WORK_FOLDER and has_work_folder(folder.parent):
                return folder
    return None


def file_identity(path: str) -> object:
    """Return an equal value for all paths of one file, including hard links."""
    if is_url(path):
        return path
    try:
        status = os.stat(path)
    except OSError:
        # It was removed meanwhile; reading it will report that.
        return os.path.realpath(path)
    return status.st_dev, status.st_ino


def check_regular(path: str) -> None:
    """Require a path to be a regular file, or a link to one.

    Raises:
        InputUnreadable: It is something else, such as a pipe, on which reading would block.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        reject_broken_link(path)
        raise InputUnreadable(
            f"cannot read {path}: {error.strerror}", remedy="check that you may read it"
        ) from error
    if not stat.S_ISREG(mode):
        raise InputUnreadable(
            f"{path} is a pipe, a socket or a device, not a regular file",
            remedy="write its content to a file first",
        )


def reject_broken_link(path: str) -> None:
    """Require a path not to be a broken link.

    Raises:
        InputUnreadable: It is a link to a path that does not exist or to itself, or this cannot be
            determined.
    """
    with convert_os_errors(path):
        if not os.path.islink(path):
            return
        try:
            os.stat(path)
        except OSError as error:
            if error.errno not in _NOT_FOUND:
                raise
            target = "itself" if error.errno == errno.ELOOP else "a path that does not exist"
            raise InputUnreadable(
                f"{path} is a link to {target}",
                remedy="download its target (git lfs pull, git annex get), mount the disk with its"
                " target, or remove the link",
            ) from error


def is_folder(path: str) -> bool:
    """Return whether a path is a folder, or a link to one.

    Raises:
        InputUnreadable: This cannot be determined.
    """
    with convert_os_errors(path):
        try:
            return stat.S_ISDIR(os.stat(path).st_mode)
        except OSError as error:
            if error.errno in _NOT_FOUND:
                return False
            raise


def path_exists(path: str) -> bool:
    """Return whether a path exists, also as a broken link.

    Raises:
        InputUnreadable: This cannot be determined.
    """
    with convert_os_errors(path):
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
    return True


def is_build(folder: str) -> bool:
    """Return whether a folder is a build.

    Raises:
        InputUnreadable: Its manifest may not be read, so that this cannot be determined.
    """
    manifest = manifest_file(Path(folder))
    if (
        os.path.isdir(os.path.join(folder, SHARD_FOLDER))
        and os.path.exists(manifest)
        and not os.access(manifest, os.R_OK)
    ):
        raise InputUnreadable(
            f"cannot read {manifest}, so that it is unknown whether {folder} is a build of sftprep",
            remedy="check that you may read it, or specify the data files by their names",
        )
    return is_build_folder(Path(folder))


def build_as_input(what: str, build: str, shards: str) -> FormatError:
    """Return the error for a build that is specified as an input.

    Args:
        what: The build, as the message calls it.
        build: Its folder or URL, for a command.
        shards: The input that names its shards alone.
    """
    return FormatError(
        f"{what} is a build of sftprep, whose records are tokenized already",
        remedy=[
            "use the inputs of that build, to prepare its records in another way",
            f"pack its sequences again, as they were cut: sftprep build '{shards}'",
            f"train on it: sfttrain run {build}",
        ],
    )


def input_in_output(name: str) -> ConfigError:
    """Return the error for an input in the folder that is written to."""
    return ConfigError(
        f"the input {name} is in the output folder",
        remedy=[f"choose another {setting('output')}", "move the input to another folder"],
    )


def has_shards(real: str) -> bool:
    """Return whether a real path is a build's folder of shards.

    The manifest may be missing.
    """
    if os.path.basename(real) != SHARD_FOLDER:
        return False
    for name in os.listdir(real):
        folder = Path(real, name)
        # Since version 2.0, the shards of each group are in a folder of their own.
        if re.fullmatch(KEY_PATTERN, name) and folder.is_dir():
            names = [f"{name}/{shard}" for shard in os.listdir(folder)]
        else:
            names = [name]
        if any(SHARD_NAME.fullmatch(name) and is_shard(Path(real, name)) for name in names):
            return True
    return False


def has_groups(real: str) -> bool:
    """Return whether a real path is a build's folder of files of groups."""
    return os.path.basename(real) == GROUP_FOLDER and any(
        has_group(Path(real, name)) for name in os.listdir(real)
    )
