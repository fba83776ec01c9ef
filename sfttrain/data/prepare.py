"""Preparation of any dataset as packs: opened, read as they are, or built once.

A dataset is one of:

1. packs or a stream of packs, which are used unchanged;
2. the folder of a build, which is opened;
3. rows that are tokenized, which become packs as they are;
4. raw records, as rows or as the path of files. They are built into a cache folder that is named by
   a digest of their content and of the settings, so that a second run finds the build.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import sftprep
from sftprep.config import cache_dir, function_key
from sftprep.errors import (
    ConfigError,
    OutputBusy,
    OutputExists,
    SftprepError,
    StorageError,
    setting,
)
from sftprep.shards import is_finished_build
from sftprep.stream import PackedStream
from sfttrain.config.setting_names import DATASET_OF_STREAM, StreamNames, TrainerNames
from sfttrain.data.formatting import FormattingFunction, check_row_settings, format_rows
from sfttrain.data.inputs import (
    file_stamps,
    first_row,
    is_build,
    is_packs,
    open_build,
    select_split,
    to_row_source,
)
from sfttrain.data.jsonl_cache import write_rows
from sfttrain.data.once_per_node import OncePerMachine, Ranks
from sfttrain.data.packs import PackSource, longest_sequence
from sfttrain.data.run_build import folder_of_process, log_accounting, run_build
from sfttrain.data.settings import NO_CUT, DataSettings
from sfttrain.data.streaming import is_stream
from sfttrain.data.token_rows import IndexedRows, TokenRows, has_packed_tokens, has_tokens
from sfttrain.data.training_templates import export_tokenizer

_LANES = 16
"""Lanes of a stream; more ranks than this get a multiple of it, so that each has a lane."""
_ROWS = "rows"
"""Subfolder of the cache with the rows of datasets in memory, as JSON Lines."""
_BUSY_SECONDS = 0.5
"""Time between two attempts to build what another run is building."""
_LOAD_AS_ROWS = 'load it as rows: datasets.load_dataset("json", data_files=PATH, split="train")'

logger = logging.getLogger(__name__)


class DataPreparation:
    """Preparation of the datasets of one trainer, each once for all its processes.

    Args:
        settings: How raw records become packs.
        tokenizer: The tokenizer for raw records; None if there is none, which allows no raw
            records.
        formatting: The user's function that makes the text of a row.
        ranks: The identity of this process; by default a single process.
        folder: The folder for prepared datasets; by default in sftprep's cache.

    Raises:
        ConfigError: If the settings contradict each other.
    """

    def __init__(
        self,
        settings: DataSettings,
        *,
        tokenizer: Any | None,
        formatting: FormattingFunction | None = None,
        ranks: Ranks | None = None,
        folder: str | None = None,
    ) -> None:
        self._settings, self._tokenizer, self._formatting = settings, tokenizer, formatting
        self._ranks = ranks or Ranks()
        self.once = OncePerMachine(self._ranks)
        self._folder = Path(folder).expanduser() if folder else cache_dir() / "prepared"
        if formatting is not None:
            check_row_settings(settings)

    def packs(self, source: Any, name: str, *, packing: bool) -> PackSource:
        """Return the packs of a dataset.

        Args:
            source: The dataset.
            name: The name of the dataset in messages, such as `train_dataset`.
            packing: Whether raw records are packed.

        Raises:
            ConfigError: If the dataset has no records that can be prepared.
            SftprepError: Any error of `sftprep.build`.
        """
        if is_packs(source) or is_build(source):
            for ignored in ("transform", "system", "chat_template_kwargs", "train_roles"):
                if getattr(self._settings, ignored) is not None:
                    logger.warning(
                        "%s is not applied to %s, which is packed already", ignored, name
                    )
            if is_build(source):
                source = open_build(source, self._settings.requested_length)
            return cast(PackSource, source)
        source = to_row_source(select_split(source, name), name)
        if not isinstance(source, (str, os.PathLike)):
            self._check_transform(source, name)
            first = first_row(source, name)
            if self._is_trained_as_is(first):
                self._reject_transform(name)
                by_index = hasattr(source, "__len__") and hasattr(source, "__getitem__")
                rows = cast(IndexedRows, source if by_index else list(source))
                return TokenRows(rows, completion_only=self._settings.use_completion_mask)
            self._check_raw(first, name)
        elif self._settings.skip_prepare:
            raise ConfigError(
                f"skip_prepare_dataset is for rows, but {name} is a path",
                remedy="remove it; rows that are tokenized are not tokenized again",
            )
        folder = self.once.do(partial(self._build_once, source, name, packing))
        shards = sftprep.open_shards(folder)
        # The format of the records is known only now, after the build has detected it.
        self._check_masks(shards, name)
        return cast(PackSource, shards)

    def stream(self, source: Any, name: str, *, packing: bool) -> PackedStream | None:
        """Return the packs of an iterable dataset, made while they are trained on.

        Args:
            source: The dataset.
            name: The name of the dataset in messages.
            packing: Whether records are packed.

        Returns:
            The stream of this rank; None if `packs` must prepare the dataset first: for rows that
            are tokenized and packed, and for packing that needs all of the data.
        """
        settings = self._settings
        first = first_row(source, name)
        if (
            self._is_trained_as_is(first)
            or (packing and settings.strategy != "bfd")
            or self._tokenizer is None
        ):
            return None
        self._check_raw(first, name)
        records: Any = source
        if self._formatting is not None:
            records = partial(_format_source, source, self._formatting, settings.text_field, name)
            records.__qualname__ = name  # the name of the source in messages
        config = {
            **settings.build_settings(packing),
            "tokenizer": export_tokenizer(self._tokenizer, self._settings.train_on),
        }
        try:
            return PackedStream(
                records,
                config=sftprep.BuildConfig.of(**config),
                order="shuffle" if settings.shuffle else "keep",
                lanes=_LANES * -(-self._ranks.world // _LANES),
                rank=self._ranks.rank,
                world_size=self._ranks.world,
            )
        except SftprepError as error:
            raise error.shown_by(StreamNames(name, DATASET_OF_STREAM)) from error

    def is_cached_rows(self, file: str) -> bool:
        """Return whether a file has the rows of a user-provided dataset in memory."""
        return Path(file).parent == self._folder / _ROWS

    def _reject_transform(self, name: str) -> None:
        if self._settings.transform is not None:
            raise ConfigError(
                f"{name} is used as it is, so {setting('transform')} cannot be applied",
                remedy=f"remove {setting('transform')}",
            )

    def _is_trained_as_is(self, first_row: Mapping[str, Any]) -> bool:
        """Return whether rows like this one are neither tokenized nor packed."""
        return has_packed_tokens(first_row) or (
            self._settings.skip_prepare and has_tokens(first_row)
        )

    def _check_transform(self, source: Any, name: str) -> None:
        """Raise ConfigError if a transform changes rows each time they are read.

        The cache would keep the result of one reading, such as one random augmentation.
        """
        state = getattr(source, "format", None)
        if (
            isinstance(state, Mapping)
            and state.get("type") == "custom"
            and not self._settings.skip_prepare
        ):
            raise ConfigError(
                f"{name} has a transform, of which only the present results would be kept",
                remedy=[
                    f"apply it once with {name}.map(...)",
                    f"tokenize in it, and set skip_prepare_dataset in {setting('dataset_kwargs')}",
                ],
            )

    def _check_raw(self, first_row: Mapping[str, Any], name: str) -> None:
        """Raise ConfigError if rows like this one cannot be prepared."""
        if self._settings.skip_prepare:
            raise ConfigError(
                f"skip_prepare_dataset: {name} is not tokenized, its rows have the keys"
                f" {', '.join(map(str, first_row))}",
                remedy=[
                    "pass a data_collator that makes batches of them",
                    f"remove skip_prepare_dataset from {setting('dataset_kwargs')}",
                ],
            )
        images = [key for key in ("image", "images") if first_row.get(key) is not None]
        if images and self._settings.transform is None and self._settings.images == "error":
            raise ConfigError(
                f"{name} has the column {images[0]}, but records with images are not supported",
                remedy=[
                    f"keep their text only with {setting('images', 'drop')}",
                    "pass a data_collator that makes batches of them, and"
                    " dataset_kwargs={'skip_prepare_dataset': True}",
                ],
            )

    def _build_once(self, source: Any, name: str, packing: bool) -> str:
        """Build a dataset, unless the cache has the build, and return its folder.

        This method runs in one process of each machine.
        """
        if self._tokenizer is None:
            raise ConfigError(
                f"{name} is not tokenized, and there is no tokenizer",
                remedy="pass a tokenizer as processing_class",
            )
        try:
            inputs, content = self._find_inputs(source, name)
        except StorageError as error:
            raise error.shown_by(TrainerNames(name, None)) from error
        rows = None if isinstance(source, (str, os.PathLike)) else inputs[0]
        settings = {
            **self._settings.build_settings(packing),
            "tokenizer": export_tokenizer(self._tokenizer, self._settings.train_on),
        }
        transform = function_key(self._settings.transform, self._settings.transform_id)
        parts = [sftprep.__version__, content, settings, *([transform] if transform else [])]
        key = sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
        folder = self._folder / key if transform is not None else folder_of_process(self._folder)
        # Data behind a name on the Hub may have changed since the last run, so the build looks at
        # it again; it reuses what has not changed.
        rebuild = content is None
        while rebuild or not is_finished_build(folder):
            try:
                options = {
                    "overwrite": rebuild,
                    "keep_spill": rebuild,
                    "workers": self._settings.workers,
                }
                run_build(
                    {**settings, **options, "inputs": inputs, "output": str(folder)},
                    name=name,
                    rows=rows,
                )
            except OutputBusy:
                time.sleep(_BUSY_SECONDS)  # another run prepares the same data
                continue
            except OutputExists:
                # Another run may have finished the build since the last look at the manifest.
                if not is_finished_build(folder):
                    raise
            rebuild = False
        log_accounting(folder, name, TrainerNames(name, rows))
        return str(folder)

    def _find_inputs(self, source: Any, name: str) -> tuple[tuple[str, ...], Any]:
        """Return the inputs of a build, and a value to identify their content.

        Rows are written to a file first. The value is None if only reading the inputs would tell
        their content, as for a name on the Hub.
        """
        if isinstance(source, (str, os.PathLike)):
            if self._formatting is not None:
                raise ConfigError(
                    f"formatting_func is for rows, but {name} is a path", remedy=_LOAD_AS_ROWS
                )
            if self._settings.shuffle and self._settings.strategy == "wrapped":
                raise ConfigError(
                    f"{setting('shuffle_dataset')} shuffles rows before they are joined, but {name}"
                    " is a path",
                    remedy=_LOAD_AS_ROWS,
                )
            return (os.fspath(source),), file_stamps(os.fspath(source))
        shuffled = _shuffle(source, self._settings.seed) if self._settings.shuffle else source
        rows: Callable[[], Iterator[Mapping[str, Any]]] = partial(iter, shuffled)
        # The fingerprint of `datasets` identifies the rows, so they need not be read again. It says
        # nothing of the results of a formatting function.
        fingerprint = getattr(shuffled, "_fingerprint", None) if self._formatting is None else None
        if self._formatting is not None:
            formatting, field = self._formatting, self._settings.text_field
            rows = partial(_format_source, shuffled, formatting, field, name)
        path, content = write_rows(rows, self._folder / _ROWS, known_as=fingerprint)
        return (str(path),), content

    def _check_masks(self, shards: Any, name: str) -> None:
        formats = {info.format for info in shards.manifest.inputs}
        if self._settings.train_prompt_assistants and "prompt-completion" in formats:
            raise ConfigError(
                f"{name} has prompts and completions, of which {setting('assistant_only_loss')}"
                f" trains completions only, but {setting('completion_only_loss')} is False",
                remedy=[
                    f"remove {setting('completion_only_loss')}",
                    "pass complete conversations as messages",
                ],
            )


def max_sequence_length(source: Any) -> int:
    """Return the largest possible length of a sequence in packs, in tokens.

    It is the limit that was set for the build or stream; without a limit, the length of the longest
    sequence.
    """
    if is_stream(source):
        return int(source.max_length)
    manifest = getattr(source, "manifest", None)
    return (
        int(manifest.max_length)
        if manifest is not None and manifest.max_length < NO_CUT
        else longest_sequence(source)
    )


def _shuffle(source: Any, seed: int) -> Any:
    # `datasets` shuffles an index only, and derives a fingerprint for the result.
    if hasattr(source, "shuffle") and callable(source.shuffle):
        return source.shuffle(seed=seed)
    import numpy as np

    rows = list(source)
    return [
        rows[k] for k in np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(len(rows))
    ]


def _format_source(
    source: Any, formatting: FormattingFunction, field: str, name: str
) -> Iterator[Mapping[str, Any]]:
    rows = iter(source)
    first = list(islice(rows, 1))
    if first and has_tokens(first[0]):
        raise ConfigError(
            f"{name} is tokenized already, so formatting_func cannot be applied",
            remedy="remove formatting_func",
        )
    return format_rows(chain(first, rows), formatting, field)
