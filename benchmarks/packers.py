"""Packers of other libraries behind one interface, for the packing benchmarks.

A packer is one line of `PEERS`, with a function that prepares its input and one that reads its
result.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

Lengths = NDArray[np.int32]
"""Lengths of sequences in tokens."""


@dataclass(frozen=True, slots=True)
class Packs:
    """Result of a packer."""

    lengths: NDArray[np.int64]
    """Lengths of the sequences, pack after pack, int64 [sequences]."""
    offsets: NDArray[np.int64]
    """Index of the first sequence of each pack, and the number of sequences, int64 [packs + 1]."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A packer of another library."""

    name: str
    package: str
    most_sequences: int
    """Number of sequences up to which it takes a reasonable time."""
    most_tokens: int
    """Number of tokens up to which it takes a reasonable amount of memory."""
    start: Callable[[Lengths, int], Callable[[], Any]]
    """Prepares the input for lengths and a capacity, and returns the call to be measured."""
    packs: Callable[[Any, Lengths], Packs]
    """Converts the result of the call."""
    same_packs: bool = False
    """Whether it makes the same packs as sftprep."""

    @property
    def is_installed(self) -> bool:
        """Whether the package is installed."""
        return find_spec(self.package) is not None


def start_trl_planning(lengths: Lengths, capacity: int) -> Callable[[], Any]:
    """Prepare TRL's segment tree of free spaces, in the loop that its `_pack_bfd` has around it.

    There is a queue of bins for each free space, and bins are in the order in which they were
    opened.
    """
    segment_tree = import_module("trl.data_utils")._SegmentTree
    length_list = lengths.tolist()

    def call() -> list[list[int]]:
        tree = segment_tree(capacity)
        tree.add(capacity)
        queues: dict[int, deque[list[int]]] = defaultdict(deque)
        bins: list[list[int]] = []
        for index in sorted(range(len(length_list)), key=length_list.__getitem__, reverse=True):
            length = length_list[index]
            if length == 0:
                break
            space = tree.search(length)
            if space < capacity:
                bin_ = queues[space].popleft()
                if not queues[space]:
                    tree.remove(space)
            else:
                bin_ = []
                bins.append(bin_)
            bin_.append(index)
            queues[space - length].append(bin_)
            if space > length:
                tree.add(space - length)
        return bins

    return call


def from_index_lists(result: Any, lengths: Lengths) -> Packs:
    """Convert packs that are lists of sequence indices."""
    members = np.array([index for pack in result for index in pack], np.int64)
    return Packs(lengths[members].astype(np.int64), np.cumsum([0, *(len(pack) for pack in result)]))


def make_trl_table(lengths: Lengths) -> Any:
    """Return the sequences as an Arrow table with tokens of one byte."""
    import pyarrow as pa

    starts = np.zeros(lengths.size + 1, np.int32)
    np.cumsum(lengths, out=starts[1:])
    tokens = pa.array(np.zeros(int(starts[-1]), np.int8))
    return pa.table({"input_ids": pa.ListArray.from_arrays(pa.array(starts), tokens)})


def start_trl_one_window(lengths: Lengths, capacity: int) -> Callable[[], Any]:
    """Prepare TRL's `_pack_bfd` on all sequences at once."""
    pack_bfd = import_module("trl.data_utils")._pack_bfd
    table = make_trl_table(lengths)
    return lambda: pack_bfd(table, capacity)


def start_trl_pack_dataset(lengths: Lengths, capacity: int) -> Callable[[], Any]:
    """Prepare TRL's `pack_dataset` as its trainer calls it."""
    datasets = import_module("datasets")
    datasets.disable_progress_bars()
    pack_dataset = import_module("trl.data_utils").pack_dataset
    documents = datasets.Dataset(make_trl_table(lengths))
    return lambda: pack_dataset(documents, capacity, strategy="bfd")


def from_trl(result: Any, lengths: Lengths) -> Packs:
    """Convert a table whose rows have the lengths of their sequences."""
    table = result if hasattr(result, "column") and not hasattr(result, "data") else result.data
    column = table.column("seq_lengths").combine_chunks()
    counts = np.array([len(row) for row in column], np.int64)
    return Packs(
        column.flatten().to_numpy().astype(np.int64), np.concatenate(([0], np.cumsum(counts)))
    )


def start_binpacking(lengths: Lengths, capacity: int) -> Callable[[], Any]:
    """Prepare binpacking as ms-swift calls it: pairs of index and length, which is the weight."""
    to_constant_volume = import_module("binpacking").to_constant_volume
    pairs = [(index, int(length)) for index, length in enumerate(lengths) if length]
    return lambda: to_constant_volume(pairs, capacity, weight_pos=1)


def from_binpacking(result: Any, lengths: Lengths) -> Packs:
    """Convert packs that are lists of pairs of index and length."""
    return from_index_lists([[index for index, _ in pack] for pack in result], lengths)


def start_grain(kind: str) -> Callable[[Lengths, int], Callable[[], Any]]:
    """Return the preparation of a packer of Grain over sequences in memory.

    Rows of Grain number their sequences per token. Only the counts are kept.
    """

    def start(lengths: Lengths, capacity: int) -> Callable[[], Any]:
        packer = getattr(import_module("grain.experimental"), kind)
        documents = [{"tokens": np.zeros(length, np.int32)} for length in lengths if length]
        source = import_module("grain").MapDataset.source(documents).to_iter_dataset()

        def call() -> list[NDArray[np.int64]]:
            rows = packer(
                source, length_struct={"tokens": capacity}, num_packing_bins=64, shuffle_bins=False
            )
            return [np.bincount(row["tokens_segment_ids"])[1:] for row in rows]

        return call

    return start


def from_grain(result: Any, lengths: Lengths) -> Packs:
    """Convert one array of sequence lengths per row."""
    return Packs(np.concatenate(result), np.cumsum([0, *(row.size for row in result)]))


PEERS: tuple[Peer, ...] = (
    Peer(
        "TRL planning",
        "trl",
        1_000_000,
        10**12,
        start_trl_planning,
        from_index_lists,
        same_packs=True,
    ),
    Peer(
        "TRL one window",
        "trl",
        100_000,
        2 * 10**8,
        start_trl_one_window,
        from_trl,
        same_packs=True,
    ),
    Peer("TRL pack_dataset", "trl", 100_000, 2 * 10**8, start_trl_pack_dataset, from_trl),
    Peer("binpacking", "binpacking", 10_000, 10**12, start_binpacking, from_binpacking),
    Peer(
        "Grain best fit",
        "grain",
        10_000,
        2 * 10**8,
        start_grain("BestFitPackIterDataset"),
        from_grain,
    ),
    Peer(
        "Grain first fit",
        "grain",
        10_000,
        2 * 10**8,
        start_grain("FirstFitPackIterDataset"),
        from_grain,
    ),
)
