"""What `sfttrain run` trains and evaluates on: packs, a path of raw records, or a dataset of the
Hub by TRL's settings."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sftprep
from sftprep.config.validation import check_local_path
from sftprep.errors import ConfigError, InputNotFound
from sftprep.shards.layout import MANIFEST_NAME

if TYPE_CHECKING:
    from sfttrain.cli.arguments import RunConfig

_HUB = "hf://"


def run_datasets(run: RunConfig, *, evaluating: bool) -> tuple[Any, Any | None]:
    """What is trained on, and the test split of `dataset_name` where one is evaluated on.

    Raises InputNotFound where there is nothing of that name, ConfigError for a split that it does
    not have.
    """
    name = str(run.data)
    if name != run.dataset_name or os.path.exists(name):
        return open_data(name), None
    found = _load(run)
    train = _split(found, run.dataset_train_split, "dataset_train_split", name)
    wanted = evaluating and run.eval_data is None
    return train, _split(
        found, run.dataset_test_split, "dataset_test_split", name
    ) if wanted else None


def open_data(path: str) -> Any:
    """Packs, where `path` is a folder of them; otherwise the path itself, whose records the trainer
    prepares."""
    if path.startswith(_HUB):
        return path
    if not os.path.exists(path):
        check_local_path(path, "DIR")
    place = Path(path).expanduser()
    if (place / MANIFEST_NAME).exists() or (
        place.is_dir() and not any(_is_data(file) for file in place.iterdir())
    ):
        return sftprep.open_shards(os.fspath(place))
    if not glob.glob(str(place)):
        raise InputNotFound(
            f"there is no file or folder {path}",
            remedy="give the folder that `sftprep build` wrote, or a file of records",
        )
    return os.fspath(place)


def _is_data(file: Path) -> bool:
    return file.is_file() and not file.name.startswith(".")


def _load(run: RunConfig) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(
            str(run.dataset_name), name=run.dataset_config, streaming=run.dataset_streaming
        )
    except Exception as error:  # datasets passes on what a dozen libraries raise
        detail = (str(error).splitlines() or [""])[0][:300]
        raise InputNotFound(
            f"the dataset {run.dataset_name} cannot be loaded: {type(error).__name__}: {detail}",
            remedy="check its name, dataset_config and the network; or give a file of records",
        ) from error


def _split(found: Any, split: str, setting: str, name: str) -> Any:
    if split not in found:
        raise ConfigError(
            f"{name} has no split {split}; it has {', '.join(found)}",
            remedy=f"choose one with --{setting}",
        )
    return found[split]
