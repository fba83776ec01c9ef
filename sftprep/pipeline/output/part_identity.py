"""The identity of a build in parts: what the commands of all parts must have in common.

The first part writes it to the work folder, and every later one compares its own with it.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import orjson

from sftprep.config.build import BuildConfig
from sftprep.core.atomic_write import storage_errors, temporary_path
from sftprep.core.hashing import digest
from sftprep.errors import ConfigError, setting
from sftprep.pipeline.executors.base import find_versions
from sftprep.pipeline.prepare.inputs import absolute_path
from sftprep.pipeline.prepare.manifest_fields import manifest_settings
from sftprep.pipeline.prepare.setup import Setup
from sftprep.shards.layout import IDENTITY_FIELD, IDENTITY_NAME


def record_identity(work: Path, config: BuildConfig, setup: Setup) -> None:
    """Write the identity of a build in parts, unless another part has; then check that it is equal.

    Args:
        work: The work folder.
        config: The settings of this part.
        setup: Its setup.

    Raises:
        ConfigError: Another part was started with another command, or on other inputs.
        StorageError: The file cannot be written.
    """
    path = work / IDENTITY_NAME
    with storage_errors(path), temporary_path(path) as temporary:
        content = orjson.dumps({IDENTITY_FIELD: describe_identity(config, setup)})
        temporary.write_bytes(content)
        try:
            # Other than a rename, it fails if the file exists, so that the first part decides.
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            if not path.exists():
                os.replace(temporary, path)
    check_identity(work, config, setup)


def check_identity(work: Path, config: BuildConfig, setup: Setup) -> None:
    """Check the identity of a build against that of the parts in its work folder, if there are any.

    Args:
        work: The work folder.
        config: The settings of the build.
        setup: Its setup.

    Raises:
        ConfigError: They are different.
    """
    path = work / IDENTITY_NAME
    try:
        earlier = orjson.loads(path.read_bytes())[IDENTITY_FIELD]
    except (OSError, ValueError, KeyError, TypeError):
        return
    identity = describe_identity(config, setup)
    if earlier == identity:
        return
    difference = _find_difference(earlier, identity, setup.names)
    raise ConfigError(
        f"this is not the build that other parts began in {work.parent}: {difference}",
        remedy=[
            f"use the same command for all parts, apart from {setting('part')}",
            f"remove {path} to start over; what has not changed is kept",
        ],
    )


def describe_identity(config: BuildConfig, setup: Setup) -> dict[str, Any]:
    """Return what determines a build, and its parts have in common, as JSON values."""
    output = config.output
    inputs = [
        digest(absolute_path(each.source), each.mark, form, setup.recipe_of[number])[:8]
        for number, (each, form) in enumerate(zip(setup.inputs, setup.formats, strict=True))
    ]
    identity = {
        "settings": manifest_settings(config, setup.names)
        | {"on_bad_record": output.on_bad_record, "max_rejected": output.max_rejected},
        "versions": find_versions(),
        "recipes": [recipe.cache_key for recipe in setup.recipes],
        "limit": dataclasses.asdict(setup.limit),
        "inputs": inputs,
    }
    values: dict[str, Any] = orjson.loads(orjson.dumps(identity, default=str))
    return values


def _find_difference(earlier: dict[str, Any], identity: dict[str, Any], names: list[str]) -> str:
    """Describe the first difference of two identities."""
    before = earlier.get("settings", {})
    for name, value in identity["settings"].items():
        if before.get(name) != value:
            return f"{setting(name)} is {value!r} here, and {before.get(name)!r} there"
    for name, value in identity["versions"].items():
        found = earlier.get("versions", {}).get(name)
        if found != value:
            return f"the version of {name} is {value} here, and {found} there"
    if earlier.get("recipes") != identity["recipes"]:
        return "the tokenizer, the chat template or a function has changed"
    marks = earlier.get("inputs", [])
    if len(marks) != len(identity["inputs"]):
        return f"{len(names):,} input files were found here, and {len(marks):,} there"
    for name, mark, other in zip(names, identity["inputs"], marks, strict=True):
        if mark != other:
            return f"the input {name} has changed"
    return "it has other settings"
