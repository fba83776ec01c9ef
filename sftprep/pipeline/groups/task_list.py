"""The tasks for the groups of a build."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from sftprep.config.build import BuildConfig, PackConfig, SourceConfig
from sftprep.config.passed_functions import PassedFunction
from sftprep.errors import ConfigError, setting
from sftprep.pipeline.groups.selection import request_stats
from sftprep.pipeline.groups.task import GroupInput, GroupSettings, GroupTask
from sftprep.pipeline.passes.overlong import NO_LIMIT
from sftprep.pipeline.passes.plan_pass import lane_block
from sftprep.pipeline.prepare.inputs import absolute_path
from sftprep.pipeline.prepare.setup import Setup
from sftprep.recipe import RecipeFile
from sftprep.sources.groups import GroupMember, cut_groups, slice_bytes
from sftprep.sources.stdin import STDIN_NAME


def make_tasks(
    setup: Setup, config: BuildConfig, recipes: Sequence[RecipeFile], work: Path, *, is_far: bool
) -> list[GroupTask]:
    """Return the tasks for the groups of a build: the training groups, then evaluation groups.

    Args:
        setup: The setup of the build.
        config: Its settings.
        recipes: The files of its recipes.
        work: The folder for the files before the commit.
        is_far: Whether the groups run on other machines.

    Raises:
        ConfigError: The build must be one group, and the groups run on other machines.
        InputUnreadable: A table cannot be read.
    """
    check_groups(setup, config, is_far=is_far)
    sources = [each.source for each in setup.inputs]
    group_bytes = None if _one_group_reasons(setup, config) else config.output.group_bytes
    groups = [*_groups(setup, group_bytes, evaluation=False)]
    # Elsewhere, another group with an equal partition may be reading its spill, or another run of
    # the same part. On a network file system, that ends the process which has mapped the file.
    is_alone = not is_far and config.output.part is None
    # The settings without the names of the inputs, of which there may be a million.
    evaluation = dataclasses.replace(config.evaluation, eval_input=())
    limit = setup.limit
    if config.output.layout == "sequences":
        # The files of a group depend on no setting that readers may change. The seed also selects
        # the records of a mixture.
        config = dataclasses.replace(config, pack=PackConfig(seed=config.pack.seed))
        limit = dataclasses.replace(limit, max_length=NO_LIMIT, overlong="keep")
    settings = GroupSettings(
        config=dataclasses.replace(config, source=SourceConfig(), evaluation=evaluation),
        entries=tuple(dataclasses.replace(entry, inputs=()) for entry in setup.entries),
        limit=limit,
        stats=request_stats(config, setup.entries),
        lane_block=lane_block(config, sources),
        slice_bytes=slice_bytes(config.output.group_bytes),
        root=work.parent,
        work=work,
        is_far=is_far,
        removes_spills=is_alone and len(groups) > 1 and not config.output.keep_spill,
    )
    tasks = [(members, False) for members in groups]
    tasks += [(members, True) for members in _groups(setup, group_bytes, evaluation=True)]
    keys = [recipe.cache_key for recipe in setup.recipes]
    return [
        GroupTask(
            number=number,
            inputs=tuple(_group_input(member, setup, recipes, keys, is_far) for member in members),
            settings=settings,
            staging=work,
            evaluation=is_evaluation,
            is_only=len(groups) == 1,
        )
        for number, (members, is_evaluation) in enumerate(tasks)
    ]


def check_groups(setup: Setup, config: BuildConfig, *, is_far: bool) -> None:
    """Check that a build can have several groups, if it runs on several machines.

    Args:
        setup: The setup of the build.
        config: Its settings.
        is_far: Whether the groups run on other machines.

    Raises:
        ConfigError: It must be one group.
    """
    reasons = _one_group_reasons(setup, config)
    if not reasons or not (is_far or config.output.part):
        return
    local = f"use {setting('executor', 'local')}"
    if config.output.part:
        local = f"leave out {setting('part', config.output.part)}"
    raise ConfigError(
        f"{' and '.join(reasons)} cannot be used on several machines: all records are read in"
        " order",
        remedy=[local, f"leave out {reasons[0]}"],
    )


def _groups(
    setup: Setup, group_bytes: int | None, *, evaluation: bool
) -> Iterator[list[GroupMember]]:
    """Yield the groups of the training or the evaluation inputs.

    Args:
        setup: The setup of the build.
        group_bytes: The size of a group; None for one group.
        evaluation: Whether to return the evaluation inputs.
    """
    inputs = [
        (number, each.source, 0 if each.stamp is None else each.stamp[0])
        for number, each in enumerate(setup.inputs)
        if each.evaluation == evaluation
    ]
    if not inputs:
        return
    if group_bytes is None:
        yield [GroupMember(number, source) for number, source, _ in inputs]
    else:
        yield from cut_groups(inputs, group_bytes)


def _one_group_reasons(setup: Setup, config: BuildConfig) -> list[str]:
    """Return why all records of a build must be read in order, as one group."""
    reasons = []
    if config.pack.pack_window is not None:
        reasons.append(setting("pack_window"))
    if any(each.source.limit is not None for each in setup.inputs):
        reasons.append(setting("limit"))
    if any(each.source.blocks is not None for each in setup.inputs):
        is_stdin = any(each.source.name == STDIN_NAME for each in setup.inputs)
        reasons.append("stdin" if is_stdin else "data in memory")
    functions = [f for recipe in setup.recipes for f in recipe.functions().values()]
    if any(isinstance(function, PassedFunction) for function in functions):
        reasons.append("a function that was passed as an object")
    return reasons


def _group_input(
    member: GroupMember,
    setup: Setup,
    recipes: Sequence[RecipeFile],
    keys: Sequence[str],
    is_far: bool,
) -> GroupInput:
    source, number = member.source, member.input
    if is_far:
        source = dataclasses.replace(source, path=absolute_path(source))
    recipe = setup.recipe_of[number]
    return GroupInput(
        number=number,
        source=source,
        entry=setup.inputs[number].entry,
        format=setup.formats[number],
        recipe=recipes[recipe],
        recipe_key=keys[recipe],
        mark=setup.inputs[number].mark,
    )
