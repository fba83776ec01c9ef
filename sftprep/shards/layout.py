"""Names of the files in a build's folder, and tests for such a folder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from sftprep.core.atomic_write import write_bytes
from sftprep.core.regular_files import read_regular_file
from sftprep.errors import ConfigError, HubError, ManifestError
from sftprep.stores.folder import StoreFolder, folder_of
from sftprep.stores.hub import is_hub_url

MANIFEST_NAME = "manifest.json"
CARD_NAME = "README.md"  # the data card
SHARD_FOLDER = "shards"
GROUP_FOLDER = "groups"
REJECTED_FOLDER = "rejected"
TOKENIZER_FOLDER = "tokenizer"  # contains the tokenizer, if tokens were added to it
EVAL_FOLDER = "eval"
WORK_FOLDER = "spill"  # contains everything that an unfinished build writes
MARKER_NAME = "build.json"
LOCK_NAME = "lock"
LEASE_NAME = "lock.lease"  # next to the lock, where the file system has no `flock`
COMMIT_NAME = "commit.json"
IDENTITY_NAME = "parts.json"  # what the parts of a build have in common
IDENTITY_FIELD = "sftprep_parts"  # the key in it
SPILL_PATTERN = r"[0-9a-f]{40}\.arrow"  # names of spills in the work folder
HELD_OUT_PATTERN = r"held-out-[0-9a-f]{40}\.arrow"  # those of held-out sequences alone
EVAL_MANIFEST_PATTERN = r"manifest-[0-9a-f]{16}\.json"  # names of manifests in the folder `eval`
KEY_PATTERN = r"[0-9a-f]{16}"  # keys of groups, see `Group.key`
TOKENIZER_PATTERN = rf"{TOKENIZER_FOLDER}/[0-9a-f]{{16}}-[0-9a-f]{{16}}"  # see `tokenizer_folder`
GROUP_FILE_PATTERN = rf"{KEY_PATTERN}-[0-9a-f]{{16}}"  # names of files of groups: key and digest
RECEIPT_PATTERN = r"receipt-[0-9a-f]{40}\.json"  # names of receipts in the work folder
RECEIPT_FIELD = "sftprep_receipt"  # the key in the first line of a receipt
SENT_SUFFIX = ".sent"  # of a file in the work folder with the SHA-256 of a shard that is elsewhere
RECIPE_PATTERN = r"recipe-[0-9a-f]{16}\.jsonl"  # names of recipes in the work folder

BUILD_FOLDERS = re.compile(
    rf"({EVAL_FOLDER}/)?({SHARD_FOLDER}(/{KEY_PATTERN})?|{GROUP_FOLDER}|{REJECTED_FOLDER})"
    rf"|{EVAL_FOLDER}|{TOKENIZER_FOLDER}|{TOKENIZER_PATTERN}"
)
"""The folders of a build, by their path in the output folder or in the work folder."""

LARGEST_MANIFEST = 64 * 1024 * 1024
"""Size limit of a manifest, or of the file of a group, in bytes: a larger one is neither read nor
written."""

LARGEST_TOKENIZER = 1 << 30
"""Size limit of a file of the tokenizer in a build, in bytes."""

# Content of the marker file, by whether a build created the work folder. These bytes are compared
# exactly, so a change would turn the work folders of earlier versions into folders of a user.
_MARKERS = {
    created: json.dumps(
        {"sftprep": "an unfinished build works in this folder", "created": created}
    ).encode()
    + b"\n"
    for created in (True, False)
}


def group_path(key: str, digest: str) -> str:
    """Return the path of the file of a group, relative to the folder of its build.

    Like those of the other files of a group, the name contains a digest of the content. The key
    alone is not enough: it depends on the records only, and the file also names their inputs. So
    no build overwrites a file that the manifest of another one names with other bytes.

    Args:
        key: The key of the group.
        digest: The digest of the file, in hex, of which the name has 16 digits.
    """
    return f"{GROUP_FOLDER}/{key}-{digest[:16]}.json"


def index_path(key: str, digest: str) -> str:
    """Return the path of the index of a group, see `group_path`."""
    return f"{GROUP_FOLDER}/{key}-{digest[:16]}.index"


def rejected_path(key: str, digest: str) -> str:
    """Return the path of the rejected records of a group, see `group_path`."""
    return f"{REJECTED_FOLDER}/{key}-{digest[:16]}.jsonl"


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def tokenizer_folder(digests: Sequence[str]) -> str:
    """Return the folder of a tokenizer, relative to that of its build.

    Args:
        digests: The SHA-256 of each of `TOKENIZER_FILES`, in hex.
    """
    return f"{TOKENIZER_FOLDER}/{'-'.join(digest[:16] for digest in digests)}"


def tokenizer_paths(tokenizer: Mapping[str, Any]) -> dict[str, str]:
    """Return the paths of the files of the tokenizer in a build, with their SHA-256.

    Args:
        tokenizer: The field `tokenizer` of the manifest.
    """
    digests = tokenizer.get("files")
    if not isinstance(digests, Mapping) or digests.keys() != {*TOKENIZER_FILES}:
        return {}
    folder = tokenizer_folder([str(digests[name]) for name in TOKENIZER_FILES])
    if not re.fullmatch(TOKENIZER_PATTERN, folder):
        return {}
    return {f"{folder}/{name}": str(digests[name]) for name in TOKENIZER_FILES}


def is_tokenizer_file(path: Path) -> bool:
    """Return whether a file has the content that the name of its folder says."""
    digests = path.parent.name.split("-")
    try:
        content = read_regular_file(path, LARGEST_TOKENIZER)
    except OSError:
        return False
    return sha256(content).hexdigest()[:16] == digests[TOKENIZER_FILES.index(path.name)]


def receipt_name(key: str) -> str:
    """Return the name of a receipt in the work folder."""
    return f"receipt-{key}.json"


def hash_name(key: str) -> str:
    """Return the name of the hashes of the records of a group in the work folder."""
    return f"hashes-{key}.npy"


def sizes_name(key: str) -> str:
    """Return the name of the sizes of the usable records of a group in the work folder."""
    return f"sizes-{key}.npy"


def raw_rejected_name(key: str) -> str:
    """Return the name of the rejected records of a receipt in the work folder.

    Their lines are counted from the start of the group.
    """
    return f"rejected-{key}.jsonl"


def mark_work_folder(root: Path, *, created: bool) -> None:
    """Write the marker of a work folder, to tell it from a user's folder.

    Args:
        root: The folder of the build.
        created: Whether a build created the work folder; if not, no build ever removes it.

    Raises:
        StorageError: The marker cannot be written.
    """
    write_bytes(root / WORK_FOLDER / MARKER_NAME, _MARKERS[created])


def has_work_folder(root: Path) -> bool:
    """Return whether a folder contains the work folder of a build."""
    return is_folder(root / WORK_FOLDER) and is_marker(root / WORK_FOLDER / MARKER_NAME)


def is_marker(path: Path) -> bool:
    """Return whether a file has the content of a marker, by which builds know their work folder."""
    return _read_marker(path) in _MARKERS.values()


def is_work_folder_created(work: Path) -> bool:
    """Return whether, according to its marker, a build created a work folder."""
    return _read_marker(work / MARKER_NAME) == _MARKERS[True]


def _read_marker(path: Path) -> bytes:
    try:
        # A link may lead to a file of the user that happens to be a copy of a marker.
        return b"" if path.is_symlink() else read_regular_file(path, 4096)
    except OSError:
        return b""


def is_build_folder(root: Path) -> bool:
    """Return whether a folder holds a build of this project, finished or not."""
    return has_work_folder(root) or has_manifest(manifest_file(root))


def is_finished_build(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder holds a finished build, which has a manifest.

    A name on the Hub that cannot be read is not one: it may be the split of a data set, and what
    reads that has its own errors.

    Raises:
        SftprepError: The folder is in a store that cannot be reached.
    """
    not_a_build = (ManifestError, ConfigError, HubError) if is_hub_url(folder) else ManifestError
    try:
        root = folder_of(folder)
        if isinstance(root, Path):
            return manifest_file(root).exists()
        return bool(read_stored_manifest(root))
    except not_a_build:
        return False


def manifest_file(root: Path) -> Path:
    """Return the path of the manifest of a build, whether or not the file exists.

    The manifest of an evaluation build, in the folder `eval`, is named by the manifest of the
    training build, so that one rename commits both. Before version 2.0, both had the same name.
    """
    if os.path.basename(os.path.abspath(root)) == EVAL_FOLDER:
        name = _linked_manifest(_read_json_object(root / ".." / MANIFEST_NAME))
        if name is not None:
            # Without that file, the folder may hold a separate build.
            return root / name if (root / name).exists() else root / MANIFEST_NAME
    return root / MANIFEST_NAME


def read_stored_manifest(folder: StoreFolder) -> tuple[str, bytes]:
    """Return the name and content of the manifest of a build in a store, see `manifest_file`.

    Of a larger file than a manifest may be, one byte more than that is returned.

    Raises:
        ManifestError: There is none.
        StorageError: The store cannot be reached.
    """
    name = MANIFEST_NAME
    if folder.name == EVAL_FOLDER:
        with suppress(FileNotFoundError, ValueError, RecursionError):
            content = folder.parent.read_range(MANIFEST_NAME, 0, LARGEST_MANIFEST + 1)
            name = _linked_manifest(json.loads(content)) or MANIFEST_NAME
    try:
        return name, folder.read_range(name, 0, LARGEST_MANIFEST + 1)
    except FileNotFoundError as error:
        raise ManifestError(
            f"{folder} is not a finished build: it has no {name}",
            remedy="specify the URL of a finished `sftprep build`",
        ) from error


def _linked_manifest(manifest: object) -> str | None:
    """Return the name of the manifest of the evaluation build that a manifest names."""
    link = manifest.get("eval") if isinstance(manifest, dict) else None
    name = link.get("manifest") if isinstance(link, dict) else None
    is_valid = isinstance(name, str) and re.fullmatch(EVAL_MANIFEST_PATTERN, name)
    return name if is_valid else None


def has_manifest(path: Path) -> bool:
    """Return whether a file is the manifest of a build."""
    return {"format_version", "sftprep_version"} <= _read_json_object(path).keys()


def has_group(path: Path) -> bool:
    """Return whether a file is that of a group of a build."""
    return {"key", "config_digest", "shards"} <= _read_json_object(path).keys()


def _read_json_object(path: Path) -> dict[str, Any]:
    """Return the values of a JSON file of the size of a manifest; {} if it is something else."""
    try:
        content = read_regular_file(path, LARGEST_MANIFEST)
        values = json.loads(content) if len(content) <= LARGEST_MANIFEST else None
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def is_folder(path: Path) -> bool:
    """Return whether a path is a folder and not a link to one."""
    return path.is_dir() and not path.is_symlink()


def is_file(path: Path) -> bool:
    """Return whether a path is a regular file and not a link to one."""
    return path.is_file() and not path.is_symlink()
