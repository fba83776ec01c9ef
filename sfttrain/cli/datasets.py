"""What `sfttrain run` trains and evaluates on: packs, a path of raw records, or a dataset of the
Hub by TRL's settings."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sftprep
from sftprep.config import check_local_path
from sftprep.errors import ConfigError, InputNotFound
from sftprep.shards import MANIFEST_NAME

if TYPE_CHECKING:
    from sfttrain.cli.arguments import RunConfig


from typing import TYPE_CHECKING

from sftprep.config import BuildConfig
from sftprep.stream import PackedStream

if TYPE_CHECKING:
    from sfttrain.cli.arguments import RunConfig
    from sfttrain.config.model_config import ModelConfig

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


def stream_of_run(run: RunConfig, training: Any, wanted: ModelConfig) -> tuple[PackedStream, Any]:
    """The stream that `sfttrain run --stream` trains on, with the tokenizer to save beside the
    model.

    Records become tokens as they do for a raw `train_dataset` of SFTTrainer. Raises ConfigError
    where --max_steps is missing, TokenizerError, and what the first records raise.
    """
    from sfttrain.data.prepare import DataSettings
    from sfttrain.models.tokenizer import tokenizer_of

    if training.max_steps <= 0:
        raise ConfigError("a stream does not say how long it is", remedy="give --max_steps N")
    model = str(wanted.model_name_or_path)
    tokenizer = tokenizer_of(
        model, revision=wanted.model_revision, trust_remote_code=wanted.trust_remote_code
    )
    settings = DataSettings.of(training, tokenizer).build_settings(packing=True)
    config = BuildConfig.of(
        **{
            **settings,
            "tokenizer": model,
            "pack_window": run.stream_window,
            "lanes": run.stream_lanes,
        }
    )
    return (
        PackedStream(
            list(run.stream or ()),
            config=config,
            order="keep" if run.stream_order == "keep" else "shuffle",
            rank=training.process_index,
            world_size=training.world_size,
        ),
        tokenizer,
    )
