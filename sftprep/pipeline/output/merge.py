"""Merging of finished builds of one recipe: the groups of all of them become one build.

Shards are linked where the file system can, and copied elsewhere; nothing is tokenized or packed
again. A group that two builds have is an error: both copies have the same packs, in shards of the
same names, and keeping one of them would silently drop what was built on purpose. The shares of a
mixture, and the search for duplicates, stay those of each build.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sftprep.config.validation import is_url
from sftprep.core.atomic_write import create_folder, storage_errors, temporary_path, write_bytes
from sftprep.core.regular_files import open_regular_file
from sftprep.errors import ConfigError, ManifestError, MismatchError, ShardError, setting
from sftprep.pipeline.output.data_card import data_card
from sftprep.pipeline.output.folder import OutputFolder, claim_output
from sftprep.pipeline.output.root_manifest import Totals, link_evaluation
from sftprep.pipeline.prepare.manifest_fields import describe_rendering
from sftprep.shards.group import GroupEntry, files_of_group
from sftprep.shards.layout import EVAL_FOLDER, SHARD_FOLDER, tokenizer_paths
from sftprep.shards.ledger import Ledger
from sftprep.shards.manifest import FORMAT_VERSION, Manifest, read_manifest
from sftprep.version import __version__

_LISTS = ("inputs", "sources", "eval_input")
_OF_INPUTS = (
    *("split", "eval_split", "config_name", "revision", "limit", "text_unit", "strip_nulls"),
    "mix_by",
    # They say how something is found or run, and not what it is.
    *("format", "tokenizer", "chat_template", "encoder", "template_backend"),
)
"""Settings that may differ between merged builds, apart from `_LISTS`."""


def merge(
    *folders: str | os.PathLike[str], output: str | os.PathLike[str], overwrite: bool = False
) -> Manifest:
    """Join finished builds of one recipe.

    Args:
        folders: The output folders of at least two builds, in the order of their groups.
        output: The folder of the new build. It may be one of the folders, with `overwrite`.
        overwrite: Whether a finished build in it may be replaced.

    Returns:
        The manifest of the new build.

    Raises:
        ConfigError: A folder or the output is in a store.
        MismatchError: The builds have other settings, tokenizers or templates, or the same group.
        ManifestError: A folder is not a build, or it has a format before version 2.0.
        ShardError: A shard is missing or has another size.
        OutputExists, OutputBusy, StorageError: The output folder cannot be used.

    Example:
        merge("build-2024", "build-2025", output="build")
    """
    for place in (*folders, output):
        if is_url(place):
            raise ConfigError(
                f"{place} is in a store, and only builds in local folders can be merged",
                remedy="copy the builds to local folders, merge them, and copy the merged build",
            )
    builds = [read_manifest(folder) for folder in folders]
    _check_builds(builds)
    evaluations = [build for build in map(_read_evaluation, builds) if build is not None]
    _check_groups(builds)
    _check_groups(evaluations)
    root = Path(output)
    with claim_output(root, overwrite=overwrite) as folder:
        merged = _merge_into(folder, builds, evaluation=False)
        evaluation = None
        if evaluations:
            evaluation = _merge_into(folder, evaluations, evaluation=True)
        merged = link_evaluation(merged, evaluation)
        card = data_card(merged, evaluation, is_merged=True)
        folder.commit(merged, evaluation, card, keep_spill=False)
    return read_manifest(root)


# --- which builds belong together -----------------------------------------------------------------


def _check_builds(builds: Sequence[Manifest]) -> None:
    if len(builds) < 2:
        raise MismatchError(
            f"{len(builds)} build was specified to merge", remedy="name at least two builds"
        )
    for build in builds:
        if not build.has_slices:
            raise ManifestError(
                f"{build.folder} has format version {build.format_version}, which has no groups",
                remedy="build it again",
            )
    for build in builds[1:]:
        difference = _find_difference(builds[0], build)
        if difference:
            raise MismatchError(
                f"{builds[0].folder} and {build.folder} cannot be merged: {difference}",
                remedy="build both with the same settings",
            )


def _find_difference(first: Manifest, other: Manifest) -> str:
    """Return what differs between two builds that must be equal; "" if nothing does."""
    for name, value in first.config.items():
        is_free = name in _LISTS or name in _OF_INPUTS
        if not is_free and other.config.get(name) != value:
            return f"{setting(name)} is {value!r} and {other.config.get(name)!r}"
    if first.tokenizer["fingerprint"] != other.tokenizer["fingerprint"]:
        return f"the tokenizers {first.tokenizer['name']} and {other.tokenizer['name']} differ"
    for name in ("digest", "tool_digest"):
        if first.template.get(name) != other.template.get(name):
            return "their chat templates differ"
    if first.config_digest != other.config_digest:
        return "a function of the user, or how records are read, differs"
    return ""


def _check_groups(builds: Sequence[Manifest]) -> None:
    """Check that no group is in two builds."""
    owner: dict[str, Manifest] = {}
    for build in builds:
        for number, entry in enumerate(build.groups):
            if entry.key in owner:
                names = [info.path for info in build.read_group(number).inputs]
                raise MismatchError(
                    f"{owner[entry.key].folder} and {build.folder} have the same records, of"
                    f" {', '.join(names[:3])}",
                    remedy=[
                        "build all inputs as one build",
                        "leave out these inputs in one of the builds",
                    ],
                )
            owner[entry.key] = build


def _read_evaluation(build: Manifest) -> Manifest | None:
    """Return the evaluation build of a build, if there is one."""
    if not build.eval or build.folder is None:
        return None
    evaluation = read_manifest(str(build.folder / EVAL_FOLDER))
    if evaluation.digest != build.eval["digest"]:
        raise ManifestError(
            f"the evaluation build in {evaluation.folder} belongs to another build",
            remedy=f"run the build of {build.folder} again",
        )
    return evaluation


# --- the merged build -----------------------------------------------------------------------------


def _merge_into(output: OutputFolder, builds: Sequence[Manifest], *, evaluation: bool) -> Manifest:
    """Put the files of builds into the staging folder, and return the manifest that names them."""
    staging = output.staging(evaluation=evaluation)
    final = output.root / EVAL_FOLDER if evaluation else output.root
    weights: dict[str, float | None] = {}
    is_comparable = len({build.config.get("mix_by") for build in builds}) == 1
    for source in (source for build in builds for source in build.sources):
        is_new = source.name not in weights
        # Shares of one source in several mixtures are none in all.
        weights[source.name] = source.weight if is_new and is_comparable else None
    totals = Totals(weights)
    for build in builds:
        for number, entry in enumerate(build.groups):
            _stage_group(build, number, entry, staging, final)
            totals.add(build.read_group(number), entry)
    first = builds[0]
    if not evaluation:
        _stage_tokenizer(first, staging)
    digests = {name: d for name, d in first.template.items() if name in ("digest", "tool_digest")}
    return dataclasses.replace(
        first,
        config=_join_settings([build.config for build in builds]),
        tokenizer={**first.tokenizer, "max_id": totals.max_id},
        template=describe_rendering(digests, totals.template),
        accounting=Ledger.from_counts(totals.counts),
        plan=totals.describe_plan(first.plan["strategy"], first.plan["seed"], first.max_length),
        rows=totals.packs,
        tokens=totals.tokens,
        trained_tokens=totals.trained_tokens,
        sftprep_version=__version__,
        format_version=FORMAT_VERSION,
        data_digest=totals.shards.hexdigest(),
        groups=tuple(totals.entries),
        sources=totals.sources(),
        lengths=totals.lengths,
        eval={},
        functions=_join_functions(builds),
        file_digest="",
        folder=staging,
    )


def _stage_group(
    build: Manifest, number: int, entry: GroupEntry, staging: Path, final: Path
) -> None:
    """Put the files of a group into the staging folder, under the same names."""
    folder = build.folder
    assert isinstance(folder, Path)
    group = build.read_group(number)
    for shard in group.shards:
        name = f"{SHARD_FOLDER}/{shard.name}"
        _check_size(folder / name, shard.bytes)
        if not _is_same_file(folder / name, final / name):
            create_folder((staging / name).parent)
            _link_or_copy(folder / name, staging / name)
    for name in files_of_group(entry, group)[len(group.shards) :]:
        _copy(folder, staging, name)


def _stage_tokenizer(build: Manifest, staging: Path) -> None:
    """Put the tokenizer of a build into the staging folder, if the build has one."""
    assert isinstance(build.folder, Path)
    for name in tokenizer_paths(build.tokenizer):
        _copy(build.folder, staging, name)


def _copy(folder: Path, staging: Path, name: str) -> None:
    try:
        with open_regular_file(folder / name) as file:
            content = file.read()
    except OSError as error:
        raise _unreadable(folder / name, error) from error
    create_folder((staging / name).parent)
    write_bytes(staging / name, content)


def _check_size(path: Path, size: int) -> None:
    try:
        found = os.lstat(path).st_size
    except OSError as error:
        raise _unreadable(path, error) from error
    if found != size or path.is_symlink():
        raise ShardError(f"{path} has {found:,} bytes, not {size:,}", remedy="run its build again")


def _unreadable(path: Path, error: OSError) -> ShardError:
    return ShardError(f"cannot read {path}: {error.strerror}", remedy="run its build again")


def _is_same_file(path: Path, other: Path) -> bool:
    return other.exists() and os.path.samefile(path, other)


def _link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where that is not possible; replaces the target."""
    with storage_errors(target), temporary_path(target) as temporary:
        try:
            os.link(source, temporary, follow_symlinks=False)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(source, temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, target)


def _join_settings(configs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the settings of merged builds; None for those that differ."""
    joined = dict(configs[0])
    for name in joined:
        values = [config.get(name) for config in configs]
        if name in _LISTS:
            joined[name] = [item for items in values for item in items or ()]
        elif name != "tokenizer" and any(value != values[0] for value in values):
            joined[name] = None
    return joined


def _join_functions(builds: Sequence[Manifest]) -> dict[str, Any]:
    used: list[Any] = []
    for build in builds:
        used += (each for each in build.functions.get("used", ()) if each not in used)
    return {"used": used} if used else {}
