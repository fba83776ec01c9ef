"""From whatever a user gives to train on to packs: opened where they are built, or built once into
a cache by sftprep."""

from __future__ import annotations

import dataclasses
import datetime
import glob
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
from sftprep.config import cache_dir
from sftprep.errors import ConfigError, OutputBusy, OutputExists, SftprepError, StorageError
from sftprep.shards import MANIFEST_NAME
from sftprep.stream import PackedStream
from sfttrain.config.setting_names import DATASET_OF_STREAM, TrainerNames
from sfttrain.data.formatting import FormattingFunction, formatted
from sfttrain.data.inputs import is_packs, rows_given
from sfttrain.data.jsonl_cache import write_rows
from sfttrain.data.once_per_node import OncePerMachine, Ranks
from sfttrain.data.packs import PackSource, longest_sequence
from sfttrain.data.run_build import run_build
from sfttrain.data.streaming import is_stream
from sfttrain.data.token_rows import RowsByNumber, TokenRows, holds_packs, holds_tokens

NO_CUT = 2**31 - 1
"""A max_length that cuts nothing."""

_LANES = 16
_ROWS = "rows"
"""In the folder of prepared datasets: the rows of datasets in memory, as JSON lines."""

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """How raw records become packs: what SFTConfig says of it, in the words of `sftprep build`."""

    text_field: str
    train_on: str
    max_length: int
    strategy: str
    """bfd, bfd_split or wrapped: where records are packed at all"""
    truncate_side: str
    shuffle: bool
    seed: int
    workers: int | None
    on_bad_record: str
    as_they_are: bool
    """Rows are taken as they are (skip_prepare_dataset)."""
    completion_masks: bool
    """Tokenized rows: their completion_mask counts."""
    all_of_completions: bool
    """Only assistant turns are trained, also in the prompt (completion_only_loss=False with
    assistant_only_loss)."""

    @classmethod
    def of(cls, args: Any, tokenizer: Any | None) -> DataSettings:
        """Read from an SFTConfig. tokenizer: whose own limit counts where nobody gave a
        max_length."""
        from sfttrain.config.sft_config import DefaultLength

        length = NO_CUT if args.max_length is None else int(args.max_length)
        if isinstance(args.max_length, DefaultLength) and tokenizer is not None:
            length = min(length, int(tokenizer.model_max_length or length))
        options = args.dataset_kwargs or {}
        unknown = sorted(set(options) - {"skip_prepare_dataset"})
        if unknown:
            raise ConfigError(
                f"dataset_kwargs has {', '.join(unknown)}, and only skip_prepare_dataset means"
                " something",
                remedy="leave the rest out",
            )
        return cls(
            text_field=args.dataset_text_field,
            train_on=(
                _TRAIN_ON[args.completion_only_loss]
                if not args.assistant_only_loss
                else "assistant"
            ),
            max_length=length,
            strategy=args.packing_strategy,
            truncate_side={"keep_start": "right", "keep_end": "left"}[args.truncation_mode],
            shuffle=args.shuffle_dataset,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            workers=args.dataset_num_proc,
            on_bad_record=args.on_bad_record,
            as_they_are=bool(options.get("skip_prepare_dataset")),
            completion_masks=args.completion_only_loss is not False,
            all_of_completions=args.assistant_only_loss and args.completion_only_loss is False,
        )

    def build_settings(self, packing: bool) -> dict[str, Any]:
        """The settings of a build."""
        # Best fit leaves the longest packs first: only where the order means something is it kept.
        kept = not self.shuffle and (not packing or self.strategy == "wrapped")
        return {
            "text_field": self.text_field,
            "train_on": self.train_on,
            "max_length": self.max_length,
            "packing": self.strategy if packing else "none",
            "truncate_side": self.truncate_side,
            "order": "keep" if kept else "shuffle",
            "seed": self.seed % 2**64,
            "on_bad_record": self.on_bad_record,
        }


_TRAIN_ON = {None: "auto", True: "completion", False: "all"}


class DataPreparation:
    """Prepares the datasets of one trainer, each once for all its processes.

    tokenizer: with what raw records are tokenized; None where there is none, and then there may be
    no raw records. folder: where prepared datasets are kept, by default in sftprep's cache.
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
        if formatting is not None and settings.train_on == "completion":
            raise ConfigError(
                "formatting_func makes plain texts, in which no completion can be told from its"
                " prompt",
                remedy="leave completion_only_loss out, or give the rows as prompt and completion",
            )

    def packs(self, source: Any, name: str, *, packing: bool) -> PackSource:
        """Packs of a dataset. name: how it is called in messages; packing: whether raw records are
        packed.

        Raises ConfigError for what holds no records, and whatever `sftprep.build` raises.
        """
        if is_packs(source):
            return cast(PackSource, source)
        if _is_build(source):
            return cast(PackSource, sftprep.open_shards(source))
        source = rows_given(_one_split(source, name), name)
        if not isinstance(source, (str, os.PathLike)):
            self._check_transform(source, name)
            first = first_row(source, name)
            if self._is_ready(first):
                by_number = hasattr(source, "__len__") and hasattr(source, "__getitem__")
                rows = cast(RowsByNumber, source if by_number else list(source))
                return TokenRows(rows, completion_only=self._settings.completion_masks)
            self._check_raw(first, name)
        elif self._settings.as_they_are:
            raise ConfigError(
                f"skip_prepare_dataset is for rows, and {name} is a path",
                remedy="leave it out; rows that are tokenized are not tokenized again",
            )
        folder = self.once.do(partial(self._built, source, name, packing))
        shards = sftprep.open_shards(folder)
        self._check_masks(shards, name)
        return cast(PackSource, shards)

    def stream(self, source: Any, name: str, *, packing: bool) -> PackedStream | None:
        """Packs of an iterable dataset, made while they are trained on; None where `packs` is to
        prepare it first.

        That is so for rows that are tokenized and packed already, and for packing that needs the
        whole of the data.
        """
        settings = self._settings
        first = first_row(source, name)
        if (
            self._is_ready(first)
            or (packing and settings.strategy != "bfd")
            or self._tokenizer is None
        ):
            return None
        self._check_raw(first, name)
        given: Any = source
        if self._formatting is not None:
            given = partial(_formatted_rows, source, self._formatting, settings.text_field, name)
            given.__qualname__ = name  # what messages call its rows
        config = {
            **settings.build_settings(packing),
            "tokenizer": str(sftprep.export_tokenizer(self._tokenizer)),
        }
        try:
            return PackedStream(
                given,
                config=sftprep.BuildConfig.of(**config),
                order="shuffle" if settings.shuffle else "keep",
                lanes=_LANES * -(-self._ranks.world // _LANES),
                rank=self._ranks.rank,
                world_size=self._ranks.world,
            )
        except SftprepError as error:
            raise error.shown_by(TrainerNames(name, DATASET_OF_STREAM)) from error

    def _is_ready(self, first: Mapping[str, Any]) -> bool:
        """Whether rows like this one are trained as they are."""
        return holds_packs(first) or (self._settings.as_they_are and holds_tokens(first))

    def _check_transform(self, source: Any, name: str) -> None:
        """Raise ConfigError where rows are made anew each time they are read, so that once is not
        enough."""
        made = getattr(source, "format", None)
        if (
            isinstance(made, Mapping)
            and made.get("type") == "custom"
            and not self._settings.as_they_are
        ):
            raise ConfigError(
                f"{name} has a transform, whose results would be kept as they are now",
                remedy=(
                    f"apply it once: {name}.map(...), or make tokens in it and set"
                    " skip_prepare_dataset in dataset_kwargs"
                ),
            )

    def _check_raw(self, first: Mapping[str, Any], name: str) -> None:
        """Raise ConfigError where rows like this one cannot be prepared."""
        if self._settings.as_they_are:
            raise ConfigError(
                f"skip_prepare_dataset: {name} is not tokenized, its rows have the keys"
                f" {', '.join(map(str, first))}",
                remedy=(
                    "give a data_collator that makes batches of them, or leave"
                    " skip_prepare_dataset out"
                ),
            )
        pictures = [key for key in ("image", "images") if first.get(key) is not None]
        if pictures:
            raise ConfigError(
                f"{name} has the column {pictures[0]}: records with pictures are not prepared here",
                remedy=(
                    "give a data_collator that makes batches of them, and"
                    " dataset_kwargs={'skip_prepare_dataset': True}"
                ),
            )

    def holds_rows(self, file: str) -> bool:
        """Whether a file is one of ours, with the rows of a dataset that was given in memory."""
        return Path(file).parent == self._folder / _ROWS

    def _built(self, source: Any, name: str, packing: bool) -> str:
        """Build, if that was not done before; the folder. Runs in one process of each machine."""
        if self._tokenizer is None:
            raise ConfigError(
                f"{name} is not tokenized, and there is no tokenizer",
                remedy="give processing_class",
            )
        try:
            inputs, content = self._inputs(source, name)
        except StorageError as error:
            raise error.shown_by(TrainerNames(name, None)) from error
        rows = None if isinstance(source, (str, os.PathLike)) else inputs[0]
        settings = {
            **self._settings.build_settings(packing),
            "tokenizer": str(sftprep.export_tokenizer(self._tokenizer)),
        }
        template = self._tokenizer.chat_template
        if template is not None and "strftime_now" in str(template):
            settings["date"] = datetime.date.today().isoformat()
        key = sha256(
            json.dumps([sftprep.__version__, content, settings], sort_keys=True).encode()
        ).hexdigest()[:32]
        folder = self._folder / key
        fresh = content is None  # what stands behind a name on the Hub may have changed
        while fresh or not (folder / MANIFEST_NAME).exists():
            try:
                options = {
                    "overwrite": fresh,
                    "keep_spill": fresh,
                    "workers": self._settings.workers,
                }
                run_build(
                    {**settings, **options, "inputs": inputs, "output": str(folder)},
                    name=name,
                    rows=rows,
                )
            except OutputBusy:
                time.sleep(0.5)  # another run prepares the same data
                continue
            except OutputExists:
                if not (folder / MANIFEST_NAME).exists():
                    raise
            fresh = False
        _tell(folder, name)
        return str(folder)

    def _inputs(self, source: Any, name: str) -> tuple[tuple[str, ...], Any]:
        """What a build reads, and what names its content; None where only reading it would tell."""
        if isinstance(source, (str, os.PathLike)):
            if self._formatting is not None:
                raise ConfigError(
                    f"formatting_func is for rows, and {name} is a path",
                    remedy=(
                        'load it first: datasets.load_dataset("json", data_files=PATH,'
                        ' split="train")'
                    ),
                )
            if self._settings.shuffle and self._settings.strategy == "wrapped":
                raise ConfigError(
                    f"shuffle_dataset shuffles rows before they are joined, and {name} is a path",
                    remedy=(
                        'load it first: datasets.load_dataset("json", data_files=PATH,'
                        ' split="train")'
                    ),
                )
            return (os.fspath(source),), _stamps(os.fspath(source))
        shuffled = _shuffled(source, self._settings.seed) if self._settings.shuffle else source
        rows: Callable[[], Iterator[Mapping[str, Any]]] = partial(iter, shuffled)
        # datasets names the state of a dataset itself, so that it need not be read again to know
        # that it is the same.
        known = getattr(shuffled, "_fingerprint", None) if self._formatting is None else None
        if self._formatting is not None:
            formatting, field = self._formatting, self._settings.text_field
            rows = partial(_formatted_rows, shuffled, formatting, field, name)
        path, content = write_rows(rows, self._folder / _ROWS, known_as=known)
        return (str(path),), content

    def _check_masks(self, shards: Any, name: str) -> None:
        formats = {info.format for info in shards.manifest.inputs}
        if self._settings.all_of_completions and "prompt-completion" in formats:
            raise ConfigError(
                f"{name} has prompts and completions; with assistant_only_loss only completions are"
                " trained in them, and completion_only_loss is False",
                remedy="leave completion_only_loss out, or give whole conversations as messages",
            )


def longest_in(source: Any) -> int:
    """Tokens that a sequence of these packs may have: as was asked of their build or stream, else
    as they have."""
    if is_stream(source):
        return int(source.max_length)
    manifest = getattr(source, "manifest", None)
    return (
        int(manifest.max_length)
        if manifest is not None and manifest.max_length < NO_CUT
        else longest_sequence(source)
    )


def needs_tokenizer(source: Any, *, as_they_are: bool) -> bool:
    """Whether `source` is prepared with a tokenizer: not where it is packs, or rows of tokens that
    are taken as they are."""
    if source is None or is_packs(source) or _is_build(source):
        return False
    if isinstance(source, (str, os.PathLike, Mapping)) or not hasattr(source, "__iter__"):
        return True
    first = next(iter(source), None)
    return not (
        isinstance(first, Mapping) and (holds_packs(first) or (as_they_are and holds_tokens(first)))
    )


def first_row(source: Any, name: str) -> Mapping[str, Any]:
    """The first row of a dataset. Raises ConfigError where there is none, or where it is no
    mapping."""
    try:
        first = next(iter(source), None)
    except TypeError as error:
        raise ConfigError(
            f"{name} is a {type(source).__name__}, which holds no rows", remedy=_WHAT_IS_TAKEN
        ) from error
    if first is None:
        raise ConfigError(f"{name} holds no row", remedy="check that it is the dataset you meant")
    if not isinstance(first, Mapping):
        raise ConfigError(
            f"{name} holds a {type(first).__name__} where a row is to be", remedy=_WHAT_IS_TAKEN
        )
    return first


_WHAT_IS_TAKEN = (
    "give a datasets.Dataset or IterableDataset, a list of dictionaries, the path of a file of"
    " records, or a folder of packs that `sftprep build` made"
)


def _is_build(source: Any) -> bool:
    return isinstance(source, (str, os.PathLike)) and (Path(source) / MANIFEST_NAME).exists()


def _one_split(source: Any, name: str) -> Any:
    """The rows of a DatasetDict that has one split, or one called train."""
    if not isinstance(source, Mapping):
        return source
    if "train" in source or len(source) == 1:
        return source["train"] if "train" in source else next(iter(source.values()))
    raise ConfigError(
        f"{name} has the splits {', '.join(map(str, source))}",
        remedy=f"choose one: {name}=dataset[SPLIT]",
    )


def _stamps(path: str) -> list[Any] | None:
    """Path, size and time of change of every file that a path, a folder or a glob names; None where
    it names none here."""
    expanded = os.path.expanduser(path)
    places = sorted(glob.glob(expanded)) if glob.has_magic(expanded) else [expanded]
    files = [
        str(file)
        for place in places
        for file in (
            sorted(p for p in Path(place).rglob("*") if p.is_file())
            if Path(place).is_dir()
            else [Path(place)]
        )
        if file.is_file()
    ]
    return [[os.path.abspath(f), os.path.getsize(f), os.stat(f).st_mtime_ns] for f in files] or None


def _shuffled(source: Any, seed: int) -> Any:
    if hasattr(source, "shuffle") and callable(source.shuffle):
        return source.shuffle(seed=seed)
    import numpy as np

    rows = list(source)
    return [
        rows[k] for k in np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(len(rows))
    ]


def _formatted_rows(
    source: Any, formatting: FormattingFunction, field: str, name: str
) -> Iterator[Mapping[str, Any]]:
    rows = iter(source)
    first = list(islice(rows, 1))
    if first and holds_tokens(first[0]):
        raise ConfigError(
            f"{name} is tokenized already, so formatting_func cannot be",
            remedy="leave formatting_func out",
        )
    return formatted(chain(first, rows), formatting, field)


def _tell(folder: Path, name: str) -> None:
    """Say what became of the records, as a warning where tokens of theirs are not trained."""
    manifest = sftprep.read_manifest(folder)
    account = manifest.accounting
    lost = account.tokens_truncated + sum(account.tokens_dropped.values())
    text = (
        f"{name}: {account.records:,} records, {account.sequences:,} sequences, {manifest.rows:,}"
        f" packs in {folder}"
    )
    details = [
        (
            f"{account.truncated:,} sequences cut at {manifest.max_length:,} tokens"
            if account.truncated
            else ""
        ),
        *(f"{count:,} dropped ({reason})" for reason, count in account.dropped.items()),
        *(f"{count:,} rejected ({reason})" for reason, count in account.rejected.items()),
    ]
    shown = "; ".join(detail for detail in details if detail)
    if lost or account.rejected:
        logger.warning(
            "%s; %s; %.1f%% of the tokens lost", text, shown, 100 * lost / max(1, account.tokens_in)
        )
    else:
        logger.info("%s%s", text, f"; {shown}" if shown else "")
