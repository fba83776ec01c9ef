"""The task of a group: everything that determines its files.

A task is a pure function of its fields and of the files that they name, so it may be run twice, or
on another machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sftprep.config.build import BuildConfig, SourceEntry
from sftprep.pipeline.mixture.quotas import Quota
from sftprep.pipeline.passes.overlong import LengthLimit
from sftprep.pipeline.passes.sequence_stats import StatsRequest
from sftprep.pipeline.passes.tokenize_pass import PartitionResult
from sftprep.pipeline.prepare.inputs import InputMark
from sftprep.recipe import RecipeFile
from sftprep.shards.group import InputInfo
from sftprep.sources.partition import Source


@dataclass(frozen=True, slots=True)
class GroupInput:
    """One input of a group.

    Attributes:
        number: The number of the input in the build.
        source: The input, or the range of it that belongs to the group.
        entry: The index of its entry in the list of sources.
        format: The format of its records.
        recipe: The recipe, in a file that workers read.
        recipe_key: The key of everything that depends on the recipe.
        mark: What tells the file from a changed one.
    """

    number: int
    source: Source
    entry: int
    format: str
    recipe: RecipeFile
    recipe_key: str
    mark: InputMark


@dataclass(frozen=True, slots=True)
class GroupSettings:
    """What all groups of a build share.

    Attributes:
        config: The settings of the build, without its inputs.
        entries: The sources, without their inputs.
        limit: The limit of the lengths of sequences.
        stats: The statistics to collect for the selection; None if all sequences are used.
        lane_block: The size in bytes of the blocks that are assigned to lanes; None if the build
            does not pack in windows.
        slice_bytes: The size of a slice.
        root: The output folder.
        work: The folder of the spills.
        is_far: Whether the group runs on another machine than the build.
        removes_spills: Whether the spills of a group are removed when it is done.
    """

    config: BuildConfig
    entries: tuple[SourceEntry, ...]
    limit: LengthLimit
    stats: StatsRequest | None
    lane_block: int | None
    slice_bytes: int
    root: Path
    work: Path
    is_far: bool = False
    removes_spills: bool = False


@dataclass(frozen=True, slots=True)
class GroupTask:
    """One group of a build.

    Attributes:
        number: The number of the group in the build.
        inputs: Its inputs, in order.
        settings: What all groups share.
        staging: The folder for its files before the commit.
        evaluation: Whether all of its records are for evaluation.
        is_only: Whether it has all records of the build, apart from evaluation records.
        quotas: The quota of each source, by the index of its entry; None if the group decides them.
        duplicates: A file with the records that equal one of an earlier group; None if the group
            finds them.
        occurrence: How many groups before this one in the build have the same records.
    """

    number: int
    inputs: tuple[GroupInput, ...]
    settings: GroupSettings
    staging: Path
    evaluation: bool = False
    is_only: bool = True
    quotas: tuple[Quota, ...] | None = None
    duplicates: Path | None = None
    occurrence: int = 0

    @property
    def is_unique(self) -> bool:
        """Whether it has data in memory, so that no later build has the same group."""
        return any(isinstance(each.mark, str) for each in self.inputs)

    @property
    def names(self) -> list[str]:
        """The name of each input, as errors and the manifest show it."""
        return [each.source.name for each in self.inputs]


@dataclass(frozen=True, slots=True)
class EvaluationPart:
    """The evaluation records of a group: they are packed together with those of other groups.

    Attributes:
        inputs: The entries of its inputs, with the ledgers of the evaluation records.
        parts: Its partitions, with the evaluation sequences alone.
        recipe_keys: The key of the recipe of each input.
    """

    inputs: tuple[InputInfo, ...]
    parts: tuple[PartitionResult, ...]
    recipe_keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GroupDone:
    """The result of a group; the file of the group is in its receipt.

    Attributes:
        receipt: The key of the receipt.
        key: The key of the group; "" for a group of evaluation records, which has no files.
        digest: The SHA-256 of its file.
        evaluation: Its evaluation records, if there are any.
        bytes: The size of its records, decompressed.
        reused: The number of partitions whose spills existed already.
        unread_columns: Of each input, the columns with content that the format does not read.
    """

    receipt: str
    key: str
    digest: str
    evaluation: EvaluationPart | None
    bytes: int
    reused: int
    unread_columns: tuple[tuple[str, ...], ...]
