"""Reading of builds: memory-mapped, in any order, with columns as NumPy views."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sftprep.errors import ManifestError, format_count
from sftprep.shards.group import ShardInfo
from sftprep.shards.layout import MANIFEST_NAME
from sftprep.shards.manifest import Manifest
from sftprep.shards.pack_index import PackIndex, read_index
from sftprep.shards.reading.mapped_shard import Columns, MappedShard, file_of
from sftprep.shards.reading.pack import Pack
from sftprep.shards.schema import position_dtype, shard_columns
from sftprep.shards.shard_file import BUILD_AGAIN, FileIdentity, ShardFile, check_size
from sftprep.shards.writer import make_position_ids
from sftprep.stores.cache import local_file
from sftprep.stores.fetch_ahead import FetchAhead, NeededFile
from sftprep.stores.folder import BuildFolder, StoreFolder, folder_of

_MOST_MAPPED = 256
"""The most shards that stay mapped. Each shard is one map, of which Linux allows a process 65,530.
A pack keeps the map of its own shard."""
_MOST_AHEAD = 8
"""The most shards that are fetched from a store ahead of their use."""


class Shards:
    """A build as a sequence of packs: `len(shards)`, `shards[i]`, `shards[i:j]`, iteration.

    `shards["input_ids"]` is a column of all packs, which are read when they are used.

    An object is cheap to create, and can be pickled for another process, which opens the files
    itself.
    """

    def __init__(self, root: BuildFolder, manifest: Manifest, *, verify: bool) -> None:
        self.root, self.manifest, self.verify = root, manifest, verify
        # Index of the first pack of each group, and of the first one after all groups.
        self._group_starts = np.cumsum([0, *(sum(entry.packs) for entry in manifest.groups)])
        # By number of a group: in it, the number of the first pack after each shard.
        self._shard_ends: dict[int, NDArray[np.int64]] = {}
        # By number, the last used last.
        self._mapped: OrderedDict[ShardNumber, MappedShard] = OrderedDict()
        self._checked: dict[ShardNumber, _CheckedFile] = {}
        self._ahead = FetchAhead(root) if isinstance(root, StoreFolder) else None

    @property
    def column_types(self) -> dict[str, str]:
        """The columns that packs have, in order, and their types, as in `shard_columns`.

        A pack may lack the columns `loss_weights` and `flags`, if others have it.
        """
        stored = {name for group in self.manifest.read_groups() for name in group.columns}
        return shard_columns(
            self.manifest.max_length,
            position_ids=True,
            loss_weights="loss_weights" in stored,
            flags="flags" in stored,
        )

    @property
    def plan_settings(self) -> dict[str, Any]:
        """The settings by which packs are planned while they are read; {} for stored packs."""
        return {}

    def __len__(self) -> int:
        return self.manifest.rows

    def __repr__(self) -> str:
        manifest = self.manifest
        return (
            f"Shards({str(self.root)!r}, {format_count(len(self), 'pack')} of up to"
            f" {manifest.max_length:,} tokens, {manifest.tokens:,} tokens,"
            f" {manifest.trained_tokens:,} trained)"
        )

    @overload
    def __getitem__(self, key: int) -> Pack: ...

    @overload
    def __getitem__(self, key: slice) -> list[Pack]: ...

    @overload
    def __getitem__(self, key: str) -> PackColumn: ...

    def __getitem__(self, key: int | slice | str) -> Pack | list[Pack] | PackColumn:
        """Return a pack by its index, a list of packs, or a column of all packs by its name.

        Raises:
            IndexError: The index is out of range.
            KeyError: No column has this name.
            TypeError: The key is something else.
            ShardError: A file is missing or damaged.
        """
        if isinstance(key, slice):
            return [self.read(index) for index in range(len(self))[key]]
        if isinstance(key, str):
            return PackColumn(self, key)
        return self.read(_to_index(key, "an integer, a slice, or the name of a column"))

    def read(self, index: int) -> Pack:
        """Return the pack of an index, which counts from the end if it is negative."""
        columns, row = self._find(index)
        seq_lengths = columns.row("seq_lengths", row)
        position_ids = (
            columns.row("position_ids", row)
            if "position_ids" in columns.values
            else make_position_ids(seq_lengths, position_dtype(self.manifest.max_length))
        )
        weights = columns.row("loss_weights", row) if "loss_weights" in columns.values else None
        return Pack(
            columns.row("input_ids", row),
            position_ids,
            columns.mask(row),
            seq_lengths,
            columns.row("origin", row),
            weights,
            columns.row("flags", row) if "flags" in columns.values else None,
        )

    def __iter__(self) -> Iterator[Pack]:
        return self.read_in_order(range(len(self)))

    def read_in_order(self, packs: Iterable[int]) -> Iterator[Pack]:
        """Yield the packs of ascending indices; of a build in a store, shards are fetched ahead."""
        return map(self.read, packs if self._ahead is None else self._announce(packs))

    def __reduce__(self) -> tuple[Any, ...]:
        return (_reopen, (str(self.root), self.manifest, self.verify))

    def seq_lengths(self, index: int) -> NDArray[np.int32]:
        """Return the lengths of the sequences in a pack, without reading its tokens.

        Args:
            index: The index of the pack.

        Returns:
            int32 [S], a view of the file.
        """
        columns, row = self._find(index)
        return columns.row("seq_lengths", row)

    def to_hf(self, *, streaming: bool = False, **options: Any) -> Any:
        """Return this build as a data set of the library `datasets`, with a pack in each row.

        The digests of blocks are checked while they are copied, and the packs of layout
        `sequences` are planned. `datasets.load_dataset` loads the folder too, with the stored
        columns alone.

        Args:
            streaming: Whether to return an `IterableDataset`, which reads packs when they are used.
                Without it, all packs are copied to the cache of `datasets`, once for each build.
            options: Those of `from_generator`, such as `cache_dir` and `num_proc`.

        Returns:
            A `Dataset` or an `IterableDataset` with the columns `column_types`.

        Raises:
            MissingDependency: datasets is not installed.
        """
        from sftprep.shards.reading.hf_dataset import to_hf

        return to_hf(self, streaming=streaming, **options)

    def fetch_ahead(self, packs: Iterable[int]) -> None:
        """Fetch the shards of the next packs from a store into the cache, in the background.

        At most 8 shards are fetched, and at most half of the limit of the cache; what the call
        before has requested and is not fetched yet is forgotten. An error of a transfer is raised
        where a pack of the shard is read. Nothing is done for a local build.

        Args:
            packs: The indices of the packs, in the order in which they will be read. They are taken
                only as far as needed.

        Raises:
            IndexError: An index is outside the build.
        """
        if self._ahead is None:
            return
        wanted: dict[ShardNumber, None] = {}
        for pack in packs:
            shard = self._find_shard(pack)[0]
            if not self._is_open(shard):
                wanted[shard] = None
            if len(wanted) == _MOST_AHEAD:
                break
        if wanted:
            self._ahead.request(chain.from_iterable(map(self._needed_files, wanted)))

    def sizes(self, packs: ArrayLike) -> PackIndex:
        """Return the sizes of packs, without reading their tokens.

        Args:
            packs: Integers [n]; the indices of the packs, from 0.

        Returns:
            The sizes, in the order of `packs`. They are in the files of the groups; in a build
            before version 2.0, they are counted in the shards.

        Raises:
            IndexError: The index is out of range.
            ShardError: A file is missing or damaged.
        """
        wanted = np.asarray(packs, dtype=np.int64)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"packs {wanted.min()} to {wanted.max()} of {len(self)}")
        groups = np.searchsorted(self._group_starts, wanted, side="right") - 1
        order = np.argsort(groups, kind="stable")
        found = PackIndex.concatenate(
            self._sizes_in_group(number, wanted[order[groups[order] == number]])
            for number in np.unique(groups).tolist()
        )
        return found.take(np.argsort(order))

    def _sizes_in_group(self, number: int, packs: NDArray[np.int64]) -> PackIndex:
        if self.manifest.has_slices:
            index = read_index(self.root, self.manifest.read_group(number))
            return index.take(packs - self._group_starts[number])
        found = []
        for pack in map(self.read, packs.tolist()):
            offsets = np.array([0, len(pack.seq_lengths)])
            found.append(PackIndex.of(pack.completion_mask, pack.seq_lengths, offsets))
        return PackIndex.concatenate(found)

    def locate(self, index: int, sequence: int) -> tuple[str, int]:
        """Return the file and the 1-based line of the record of a sequence.

        Args:
            index: The index of the pack.
            sequence: The index of the sequence in the pack.
        """
        columns, row = self._find(index)
        group = self._find_shard(index)[0].group
        return self.manifest.locate_in_group(int(columns.row("origin", row)[sequence]), group)

    def _find(self, index: int) -> tuple[Columns, int]:
        """Open the block of a pack, and return it with the row of the pack."""
        shard, pack = self._find_shard(index)
        if shard in self._mapped:
            self._mapped.move_to_end(shard)
        else:
            self._mapped[shard] = self._map(shard)
            if len(self._mapped) > _MOST_MAPPED:
                self._mapped.popitem(last=False)
        return self._mapped[shard].find(pack)

    def _find_shard(self, index: int) -> tuple[ShardNumber, int]:
        """Return the number of the shard of a pack, and the number of the pack in the shard."""
        pack = index + len(self) if index < 0 else index
        if not 0 <= pack < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        group = int(np.searchsorted(self._group_starts, pack, side="right")) - 1
        pack -= int(self._group_starts[group])
        ends = self._ends_of_shards(group)
        shard = int(np.searchsorted(ends, pack, side="right"))
        return ShardNumber(group, shard), pack - (int(ends[shard - 1]) if shard else 0)

    def _ends_of_shards(self, group: int) -> NDArray[np.int64]:
        ends = self._shard_ends.get(group)
        if ends is None:
            ends = np.cumsum(self.manifest.groups[group].packs, dtype=np.int64)
            self._shard_ends[group] = ends
        return ends

    def _announce(self, packs: Iterable[int]) -> Iterator[int]:
        """Yield the packs of a build in order; at each shard, request those after it."""
        last = None
        for pack in packs:
            shard = self._find_shard(pack)[0]
            if shard != last:
                self.fetch_ahead(self._later_shards(pack))
                last = shard
            yield pack

    def _later_shards(self, index: int) -> Iterator[int]:
        """Yield the first pack of each shard after that of a pack."""
        for group in range(self._find_shard(index)[0].group, len(self.manifest.groups)):
            for end in (self._group_starts[group] + self._ends_of_shards(group)).tolist():
                if index < end < len(self):
                    yield end

    def _is_open(self, shard: ShardNumber) -> bool:
        """Return whether a pack of a shard can be read without its file in the cache."""
        return shard in self._mapped

    def _needed_files(self, shard: ShardNumber) -> Iterator[NeededFile]:
        """Yield the files that must be in the cache to read the packs of a shard."""
        yield file_of(self._find_info(shard))

    def _map(self, shard: ShardNumber) -> MappedShard:
        """Map a shard; the blocks that this object has checked before are not checked again."""
        info = self._find_info(shard)
        with local_file(self.root, *file_of(info)) as path:
            identity = check_size(path, info)
            checked = self._checked.get(shard)
            if checked is None or checked.identity != identity:
                self._checked[shard] = checked = _CheckedFile(identity)
            file = ShardFile(
                path, info, self.manifest.max_length, verify=self.verify, checked=checked.blocks
            )
        return MappedShard(file)

    def _find_info(self, shard: ShardNumber) -> ShardInfo:
        """Return the entry of a shard, from the file of its group."""
        group, number = shard
        infos = self.manifest.read_group(group).shards
        packs = self.manifest.groups[group].packs
        if len(infos) != len(packs) or infos[number].rows != packs[number]:
            raise ManifestError(
                f"{self.root / MANIFEST_NAME} is damaged: the packs of group"
                f" {self.manifest.groups[group].key} are not those of its shards",
                remedy=BUILD_AGAIN,
            )
        return infos[number]


class PackColumn(Sequence[NDArray[Any] | None]):
    """A column of all packs of a build, which are read when they are used.

    A value is the array of one pack, or None where the pack lacks the column.

    Raises:
        KeyError: No column has this name.
    """

    def __init__(self, shards: Shards, name: str) -> None:
        names = [each.name for each in fields(Pack)]
        if name not in names:
            raise KeyError(f"packs have no column {name!r}, but {', '.join(names)}")
        self._shards, self._name = shards, name

    def __repr__(self) -> str:
        return f"PackColumn({self._name!r} of {self._shards!r})"

    def __len__(self) -> int:
        return len(self._shards)

    @overload
    def __getitem__(self, key: int) -> NDArray[Any] | None: ...

    @overload
    def __getitem__(self, key: slice) -> list[NDArray[Any] | None]: ...

    def __getitem__(self, key: int | slice) -> Any:
        if isinstance(key, slice):
            return [getattr(pack, self._name) for pack in self._shards[key]]
        index = _to_index(key, "an integer or a slice")
        return getattr(self._shards.read(index), self._name)


def _to_index(key: object, accepted: str) -> int:
    """Return an integer of Python or NumPy as the former.

    Raises:
        TypeError: The key is something else.
    """
    try:
        if isinstance(key, bool):
            raise TypeError
        return operator.index(key)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"packs are selected by {accepted}, not by {type(key).__name__}") from None


class ShardNumber(NamedTuple):
    """The number of a group, and the number of a shard in it."""

    group: int
    shard: int


@dataclass(frozen=True, slots=True)
class _CheckedFile:
    """The blocks of a file that were checked, as long as the file is the same."""

    identity: FileIdentity
    blocks: set[int] = field(default_factory=set)


def _reopen(root: str, manifest: Manifest, verify: bool) -> Shards:
    return Shards(folder_of(root), manifest, verify=verify)
