"""The Python interface of builds and previews.

The inputs are those of a configuration, paths, or records in memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, overload

from sftprep.config.build import BuildConfig
from sftprep.config.validation import check_integer, to_strings
from sftprep.errors import ConfigError, setting
from sftprep.pipeline.build import BuildReport
from sftprep.pipeline.build import build as run
from sftprep.pipeline.part import PartReport, build_part
from sftprep.previews.result import Preview
from sftprep.previews.run import SAMPLE_RECORDS, examine_sample, preview_records
from sftprep.previews.sample import RecordChoice
from sftprep.sources.discovery.saved import choose_split
from sftprep.sources.in_memory import dataset_kind, memory_source, reject_columns
from sftprep.sources.partition import Source

_KINDS_WITH_SPLITS = ("DatasetDict", "IterableDatasetDict")


@overload
def build(
    source: Any = None,
    *,
    eval_source: Any = None,
    progress: Callable[[str, int, int], None] = ...,
    executor: Any = None,
    part: None = None,
    **settings: Any,
) -> BuildReport: ...


@overload
def build(
    source: Any = None,
    *,
    eval_source: Any = None,
    progress: Callable[[str, int, int], None] = ...,
    executor: Any = None,
    part: str,
    **settings: Any,
) -> PartReport: ...


def build(
    source: Any = None,
    *,
    eval_source: Any = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
    executor: Any = None,
    part: str | None = None,
    **settings: Any,
) -> BuildReport | PartReport:
    """Tokenize, mask and pack records into shards, and write the manifest last.

    Args:
        source: What to train on, one of

            - a path, glob, folder or Hub name, or a list of these;
            - records: a `datasets.Dataset`, `IterableDataset` or `DatasetDict`, a `pyarrow.Table`,
              an iterable of dictionaries, or a generator function;
            - a `BuildConfig`, without other settings;
            - None, if the settings contain `sources`, the entries of a mixture.

            The train split of a `DatasetDict` is trained on; if it has exactly one other split,
            that one is the evaluation data; `split` and `eval_split` select other splits.
        eval_source: Records or paths for evaluation; their build is written to output/eval.
        progress: Called with the name of the stage, the work done, and the work in total.
        executor: "local", "ray", or an object that runs the tasks of the build (docs/scale.md).
        part: I/K writes the I-th of K parts (docs/scale.md), and returns a `PartReport`.
        **settings: The settings of the command line by name (`tokenizer`, `output`, `max_length`,
            ...). The tokenizer may also be a tokenizer object of transformers.

    Returns:
        The report, with the manifest of the build.

    Raises:
        SftprepError: The build failed. The output folder has no new build; an old one is unchanged.

    Example:
        report = build("chats.jsonl", tokenizer="Qwen/Qwen3-8B", output="shards", max_length=4096)
        print(report.manifest.rows, "packs in", report.folder)
    """
    if isinstance(source, BuildConfig):
        if settings or eval_source is not None or part is not None:
            raise _combined_config()
        return _run(source, progress=progress, executor=executor)
    if isinstance(executor, str):
        settings, executor = {**settings, "executor": executor}, None
    inputs = _resolve_inputs(source, eval_source, {**settings, "part": part})
    return _run(
        inputs.config,
        data=inputs.data,
        eval_data=inputs.eval_data,
        progress=progress,
        executor=executor,
    )


def preview(
    source: Any = None,
    *,
    number: int = 5,
    line: int | tuple[str, int] | Sequence[int | tuple[str, int]] = (),
    random: int | None = None,
    **settings: Any,
) -> Preview:
    """Return what a build would make of some records: their tokens, roles, masks and findings.

    Nothing is written. The functions are those of the build, so the tokens and masks are too.

    Args:
        source: As for `build`.
        number: The number of records.
        line: The line (or row, from 1) of the record that is shown instead, or a list of them;
            with several inputs, pairs of the input and the line.
        random: The seed of a random choice; None for the first records.
        **settings: The settings of `build`; those about the output have no effect.

    Raises:
        SftprepError: The build could not start, or an input cannot be read.

    Example:
        result = preview("chats.jsonl", tokenizer="Qwen/Qwen3-8B", train_on="assistant")
        sequence = result.records[0].sequences[0]
        print([*zip(sequence.pieces, sequence.roles, sequence.completion_mask)])
    """
    check_integer(number, setting("number"), 1, 10_000)
    inputs = _resolve_inputs(source, None, settings)
    choice = RecordChoice(number, _to_places(line), random)
    return preview_records(inputs.config, choice, data=inputs.data)


def doctor(source: Any = None, *, records: int = SAMPLE_RECORDS, **settings: Any) -> Preview:
    """Return findings about a sample of the records that is spread evenly over the inputs.

    Args:
        source: As for `build`.
        records: The largest number of records that are examined.
        **settings: The settings of `build`; those about the output have no effect.

    Returns:
        A preview without records; `ok` is whether no finding is major.

    Raises:
        SftprepError: The build could not start, or an input cannot be read.

    Example:
        for verdict in doctor("chats.jsonl", tokenizer="Qwen/Qwen3-8B").verdicts:
            print(verdict.severity, verdict.kind, verdict.number, verdict.file, verdict.line)
    """
    check_integer(records, setting("records"), 1, 10_000_000)
    inputs = _resolve_inputs(source, None, settings)
    return examine_sample(inputs.config, data=inputs.data, count=records)


def _to_places(
    line: int | tuple[str, int] | Sequence[int | tuple[str, int]],
) -> tuple[tuple[str, int], ...]:
    """Return lines as pairs of an input and a line; the input is "" without one."""
    match line:
        case int():
            return (("", line),)
        case (str(file), int(number)):
            return ((file, number),)
        case [*items]:
            return tuple(place for item in items for place in _to_places(item))
    raise ConfigError(
        f"{setting('line')} is {line!r}",
        remedy=f"use {setting('line', 17)}, or pairs of an input and a line",
    )


class _Inputs(NamedTuple):
    """The settings of a build, and its records in memory."""

    config: BuildConfig
    data: list[Source]
    eval_data: list[Source]


def _resolve_inputs(source: Any, eval_source: Any, settings: dict[str, Any]) -> _Inputs:
    """Return the settings, and the data in memory, for the arguments of a front end."""
    if isinstance(source, BuildConfig):
        if settings:
            raise _combined_config()
        return _Inputs(source, [], [])
    settings = _to_plain_settings(settings)
    if eval_source is None and not _is_paths(settings.get("eval_input", "")):
        eval_source = settings.pop("eval_input")
    # Before the test for a mapping: a dictionary of lists is columns, not splits.
    reject_columns(source)
    if isinstance(source, Mapping) or dataset_kind(source) in _KINDS_WITH_SPLITS:
        source, eval_source = _select_splits(source, eval_source, settings)
    data = _memory_sources(source, "inputs", settings)
    eval_data = _memory_sources(eval_source, "eval_input", settings)
    return _Inputs(BuildConfig.of(**settings), data, eval_data)


def _combined_config() -> ConfigError:
    return ConfigError(
        "a BuildConfig cannot be combined with other settings",
        remedy="put them into the BuildConfig, or pass a source instead of it",
    )


def _run(
    config: BuildConfig,
    *,
    data: Sequence[Source] = (),
    eval_data: Sequence[Source] = (),
    progress: Callable[[str, int, int], None],
    executor: Any,
) -> BuildReport | PartReport:
    if config.output.part is None:
        return run(config, data=data, eval_data=eval_data, progress=progress, executor=executor)
    if executor is not None:
        raise ConfigError(
            "a part of a build runs on this machine, not on an executor",
            remedy=[f"leave out {setting('part')}", f"leave out {setting('executor')}"],
        )
    return build_part(config, data=data, eval_data=eval_data, progress=progress)


def _select_splits(splits: Any, eval_source: Any, settings: dict[str, Any]) -> tuple[Any, Any]:
    """Return the training data and the evaluation data of a DatasetDict.

    Args:
        splits: The DatasetDict.
        eval_source: Other evaluation data, or None.
        settings: The settings; `split` and `eval_split` are removed from them.
    """
    names = list(splits)
    wanted_split, wanted_eval = settings.pop("split", None), settings.pop("eval_split", None)
    train = choose_split(names, wanted_split, "the data set")
    if wanted_eval is not None:
        return splits[train], splits[choose_split(names, wanted_eval, "the data set")]
    # A single other split is used for evaluation only if no setting says otherwise.
    others = [name for name in names if name != train]
    if (
        wanted_split is not None
        or eval_source is not None
        or settings.get("eval_fraction")
        or settings.get("eval_input")
        or not others
    ):
        return splits[train], eval_source
    if len(others) > 1:
        raise ConfigError(
            f"the dataset has the splits {', '.join(names)}, and several of them could be the"
            " evaluation data",
            remedy=[
                f"choose one with {setting('eval_split', others[0])}",
                f"train on one split without evaluation with {setting('split', train)}",
            ],
        )
    return splits[train], splits[others[0]]


def _to_plain_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with paths and tokenizers as strings, for a configuration."""
    # None means that the setting has its default.
    settings = {name: value for name, value in settings.items() if value is not None}
    # A tokenizer object is written to a file, from which each worker loads it.
    if not isinstance(settings.get("tokenizer", ""), (str, os.PathLike)):
        from sftprep.tokenize.loading.export import export_tokenizer

        settings["tokenizer"] = export_tokenizer(settings["tokenizer"])
    paths = {name: value for name, value in settings.items() if isinstance(value, os.PathLike)}
    settings |= {name: str(path) for name, path in paths.items()}
    return settings


def _memory_sources(source: Any, name: str, settings: dict[str, Any]) -> list[Source]:
    """Return records in memory as sources; paths are added to the settings instead.

    Args:
        source: Records, paths, or None.
        name: The setting for paths.
        settings: The settings.
    """
    if source is None:
        return []
    if _is_paths(source):
        settings[name] = to_strings(source)
        return []
    return [memory_source(source)]


def _is_paths(source: Any) -> bool:
    """Return whether a source is a path or name, or a list of these, and not records."""
    if isinstance(source, (list, tuple)):
        return bool(source) and all(isinstance(item, (str, os.PathLike)) for item in source)
    return isinstance(source, (str, os.PathLike))
