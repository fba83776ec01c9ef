"""The data of `sfttrain run`: packs, a path of raw records, or a Hub dataset."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sftprep
from sftprep.config import BuildConfig, check_local_path
from sftprep.errors import ConfigError, InputNotFound, SftprepError, setting
from sftprep.shards import is_finished_build
from sftprep.stores import is_url
from sftprep.stream import PackedStream
from sfttrain.data.inputs import HUB_PREFIX, file_stamps, open_build

if TYPE_CHECKING:
    from sfttrain.cli.arguments import RunConfig
    from sfttrain.config.model_config import ModelConfig


def load_run_datasets(
    run: RunConfig, *, evaluating: bool, max_length: int | None = None
) -> tuple[Any, Any | None]:
    """Load the training data, and the test split of `dataset_name`.

    The test split is loaded only if the run evaluates on it.

    Args:
        run: The settings.
        evaluating: Whether the run evaluates.
        max_length: As for `open_data`.

    Returns:
        The training data, and the test split or None.

    Raises:
        InputNotFound: The data do not exist.
        ConfigError: The dataset does not have the split.
    """
    name = str(run.data)
    is_on_hub = name.startswith(HUB_PREFIX)
    if name != run.dataset_name or os.path.exists(name) or (is_url(name) and not is_on_hub):
        return open_data(name, max_length), None
    if not is_on_hub:
        check_local_path(name, setting("dataset_name"))
    splits = _load_from_hub(run)
    train = _select_split(splits, run.dataset_train_split, "dataset_train_split", name)
    if not evaluating or run.eval_data is not None:
        return train, None
    return train, _select_split(splits, run.dataset_test_split, "dataset_test_split", name)


def open_eval_build(train: Any, max_length: int | None = None) -> sftprep.Shards | None:
    """Open the evaluation build of the training data; None if it has none.

    Args:
        train: The training data.
        max_length: As for `open_data`.

    Raises:
        ManifestError: The evaluation build that the manifest names does not exist.
    """
    if not isinstance(train, sftprep.Shards) or not train.manifest.eval:
        return None
    return open_build(str(train.root / str(train.manifest.eval["folder"])), max_length)


def open_data(path: str, max_length: int | None = None) -> Any:
    """Open a folder of packs; return other paths unchanged.

    The trainer prepares the records of other paths.

    Args:
        path: The path or URL.
        max_length: The requested length of packs that are planned while they are read.

    Raises:
        InputNotFound: The path does not exist, and no file matches it as a pattern.
        StorageError: The path is the URL of a store that cannot be reached.
    """
    if is_url(path):
        if is_finished_build(path):
            return open_build(path, max_length)
        if not path.startswith(HUB_PREFIX) and file_stamps(path) is None:
            raise _not_found(path)
        return path
    if not os.path.exists(path):
        check_local_path(path, "DIR")
    folder = Path(path).expanduser()
    # A folder without any file is opened as well, for its error: an unfinished build.
    if is_finished_build(folder) or (
        folder.is_dir() and not any(_is_data_file(file) for file in folder.iterdir())
    ):
        return open_build(folder, max_length)
    if not (folder.exists() or glob.glob(str(folder))):
        raise _not_found(path)
    return os.fspath(folder)


def _not_found(path: str) -> InputNotFound:
    return InputNotFound(
        f"the file or folder {path} does not exist",
        remedy="specify the folder that `sftprep build` wrote, or a file of records",
    )


def _is_data_file(file: Path) -> bool:
    return file.is_file() and not file.name.startswith(".")


def _load_from_hub(run: RunConfig) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(
            str(run.dataset_name), name=run.dataset_config, streaming=run.dataset_streaming
        )
    except Exception as error:  # datasets passes on the errors of a dozen libraries
        detail = (str(error).splitlines() or [""])[0][:300]
        raise InputNotFound(
            f"the dataset {run.dataset_name} cannot be loaded: {type(error).__name__}: {detail}",
            remedy=[
                f"check its name, {setting('dataset_config')} and the network",
                "specify a file of records",
            ],
        ) from error


def _select_split(splits: Any, split: str, setting_name: str, name: str) -> Any:
    if split not in splits:
        raise ConfigError(
            f"{name} has no split {split}; it has {', '.join(splits)}",
            remedy=f"choose one with {setting(setting_name)}",
        )
    return splits[split]


def open_run_stream(
    run: RunConfig, training: Any, model_config: ModelConfig
) -> tuple[PackedStream, Any]:
    """Open the stream of `sfttrain run --stream`, and load the model's tokenizer.

    Records are tokenized as those of a raw `train_dataset` of SFTTrainer are.

    Args:
        run: The settings of the data.
        training: The SFTConfig.
        model_config: The settings of the model.

    Returns:
        The stream, and the tokenizer, which is saved with the trained model.

    Raises:
        ConfigError: `max_steps` is missing.
        TokenizerError: The model has no usable tokenizer.
        SftprepError: The first records cannot be used.
    """
    from sfttrain.config.setting_names import RunStreamNames
    from sfttrain.data.settings import DataSettings
    from sfttrain.models.tokenizer import load_required_tokenizer

    if training.max_steps <= 0:
        raise ConfigError(
            "the length of a stream is not known", remedy=f"specify {setting('max_steps', 'N')}"
        )
    model = str(model_config.model_name_or_path)
    tokenizer = load_required_tokenizer(
        model,
        revision=model_config.model_revision,
        trust_remote_code=model_config.trust_remote_code,
    )
    settings = DataSettings.from_config(training, tokenizer).build_settings(packing=True)
    # The trainer does the same to the tokenizer that it saves.
    changes = {"chat_template": training.chat_template_path, "eos_token": training.eos_token}
    settings |= {name: value for name, value in changes.items() if value is not None}
    try:
        config = BuildConfig.of(
            **{
                **settings,
                "tokenizer": model,
                "pack_window": run.stream_window,
                "lanes": run.stream_lanes,
            }
        )
        stream = PackedStream(
            list(run.stream or ()),
            config=config,
            order="keep" if run.stream_order == "keep" else "shuffle",
            rank=training.process_index,
            world_size=training.world_size,
        )
    except SftprepError as error:
        raise error.shown_by(RunStreamNames("stream", None)) from error
    return stream, tokenizer
