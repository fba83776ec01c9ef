"""The Python face of a build: from a config, from paths, or from records in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from sftprep.config.build import BuildConfig
from sftprep.config.validation import to_strings
from sftprep.errors import ConfigError
from sftprep.pipeline.build import BuildReport
from sftprep.pipeline.build import build as run
from sftprep.sources.discovery.saved import choose_split
from sftprep.sources.in_memory import dataset_kind, memory_source, reject_columns
from sftprep.sources.partition import Source


def build(
    source: Any = None,
    *,
    eval_source: Any = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
    **settings: Any,
) -> BuildReport:
    """Prepare records for training: tokenize, pack, write shards, and the manifest last.

    source: a BuildConfig; or a path, glob, folder or Hub name, or several; or records: a
    `datasets.Dataset`, `IterableDataset` or `DatasetDict`, a `pyarrow.Table`, an iterable of
    dictionaries, or a generator function; None where settings name `sources`. A DatasetDict gives
    its train split to the build and, where it has one other split, that to the evaluation build;
    `split` and `eval_split` choose among more. eval_source: records or paths to evaluate on,
    written to output/eval. settings: those of the command line by name (`tokenizer`, `output`,
    `max_length`, ...); tokenizer may be a live one.

    Raises the errors of `sftprep.errors`; the output folder then holds no new build, and an old one
    as it was.
    """
    if isinstance(source, BuildConfig):
        if settings or eval_source is not None:
            raise ConfigError(
                "settings are given beside a BuildConfig",
                remedy="put them into the config, or give a source",
            )
        return run(source, progress=progress)
    given = {name: value for name, value in settings.items() if value is not None}
    if not isinstance(given.get("tokenizer", ""), (str, os.PathLike)):
        from sftprep.tokenize.loading.export import export_tokenizer

        given["tokenizer"] = export_tokenizer(given["tokenizer"])
    paths = {name: value for name, value in given.items() if isinstance(value, os.PathLike)}
    given |= {name: str(path) for name, path in paths.items()}
    if eval_source is None and not _is_paths(given.get("eval_input", "")):
        eval_source = given.pop("eval_input")
    reject_columns(source)
    if isinstance(source, Mapping) or dataset_kind(source) in (
        "DatasetDict",
        "IterableDatasetDict",
    ):
        source, eval_source = _splits(source, eval_source, given)
    data, eval_data = _records(source, "inputs", given), _records(eval_source, "eval_input", given)
    return run(BuildConfig.of(**given), data=data, eval_data=eval_data, progress=progress)


def _splits(splits: Any, eval_source: Any, settings: dict[str, Any]) -> tuple[Any, Any]:
    """What to train and to evaluate on of a DatasetDict; takes `split` and `eval_split` out of the
    settings."""
    names = list(splits)
    asked, other = settings.pop("split", None), settings.pop("eval_split", None)
    train = choose_split(names, asked, "the data set")
    if other is not None:
        return splits[train], splits[choose_split(names, other, "the data set")]
    rest = [name for name in names if name != train]
    if (
        asked is not None
        or eval_source is not None
        or settings.get("eval_fraction")
        or settings.get("eval_input")
        or not rest
    ):
        return splits[train], eval_source
    if len(rest) > 1:
        raise ConfigError(
            f"the data set has the splits {', '.join(names)}, of which several could be"
            " evaluated on",
            remedy=(
                f"choose one with eval_split={rest[0]!r}, or train on one alone with"
                f" split={train!r}"
            ),
        )
    return splits[train], splits[rest[0]]


def _records(source: Any, name: str, settings: dict[str, Any]) -> list[Source]:
    """Records in memory as sources; paths go to the settings, under a name."""
    if source is None:
        return []
    if _is_paths(source):
        settings[name] = to_strings(source)
        return []
    return [memory_source(source)]


def _is_paths(source: Any) -> bool:
    """Whether these are paths or names, and not records."""
    if isinstance(source, (list, tuple)):
        return bool(source) and all(isinstance(item, (str, os.PathLike)) for item in source)
    return isinstance(source, (str, os.PathLike))
