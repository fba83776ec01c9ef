"""The choice of records: the first ones, some lines, or a sample of all.

A sample is spread evenly over the inputs, and deterministic:

1. The inputs are cut into partitions, as for a build. Of N partitions, every k-th one is kept,
   where k is the smallest power of 2 that leaves at most `_MOST_PARTITIONS`. As the inputs are read
   only once and N is not known before, k starts at 1, and whenever too many partitions are kept,
   every second one is given up and k doubles.
2. The sample is shared evenly among the inputs, as far as they have records; and of an input, among
   its kept partitions in proportion to their records, which are taken at equal distances.

Cost: of files of lines and tables, only the kept partitions are read. Inputs that can only be read
from their start (compressed files, JSON arrays, CSV, data in memory) are read once.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, islice, takewhile, zip_longest

from sftprep.config.validation import is_url
from sftprep.errors import ConfigError, setting
from sftprep.pipeline.groups.ledgers import lines_before
from sftprep.sources.partition import Partition, Source, cut, read_partition
from sftprep.sources.readers.jsonl import split_lines

_MOST_PARTITIONS = 128
_PART_BYTES = 1 << 20
"""The size of a partition: smaller than in a build, because few of its records are used."""


@dataclass(frozen=True, slots=True)
class ChosenRecord:
    """A record that was chosen.

    Attributes:
        source: The index of its input.
        number: Its line or row in a range of the input, from 0.
        data: The line, as JSON, without its end.
        start: The first byte or row of that range; 0 for the whole input.
    """

    source: int
    number: int
    data: bytes
    start: int = 0

    def line(self, sources: Sequence[Source]) -> int:
        """Return its line or row in the input, from 1.

        The lines before its range are counted here, because few records are shown.

        Raises:
            InputUnreadable: The input cannot be read.
        """
        return _count_lines(sources[self.source], self.start) + self.number + 1


@dataclass(frozen=True, slots=True)
class RecordChoice:
    """Which records are chosen.

    Attributes:
        count: The number of records.
        lines: The lines instead, as (file, line); the file is "" if there is only one input.
        seed: The seed of a random choice; None for the first records.
    """

    count: int = 5
    lines: tuple[tuple[str, int], ...] = ()
    seed: int | None = None


def choose_records(
    sources: Sequence[Source], entries: Sequence[int], choice: RecordChoice, pool: int
) -> list[ChosenRecord]:
    """Return the chosen records.

    The first records are taken from one entry of a mixture after the other, in turn.

    Args:
        sources: The inputs.
        entries: The index of the entry of each input.
        choice: Which records are chosen.
        pool: The size of the sample for a random choice.

    Raises:
        ConfigError: A line does not exist.
        InputUnreadable: An input cannot be read.
    """
    if choice.lines:
        return _find_lines(sources, choice.lines)
    if choice.seed is not None:
        sample, _ = sample_records(sources, pool)
        chosen = random.Random(choice.seed).sample(sample, min(choice.count, len(sample)))
        return sorted(chosen, key=_position)
    by_entry: dict[int, list[int]] = {}
    for number, entry in enumerate(entries):
        by_entry.setdefault(entry, []).append(number)
    heads = [
        [*islice(_iterate_records(sources, numbers), choice.count)] for numbers in by_entry.values()
    ]
    turns = (record for turn in zip_longest(*heads) for record in turn if record is not None)
    chosen = [*islice(turns, choice.count)]
    return sorted(chosen, key=_position)


def sample_records(sources: Sequence[Source], count: int) -> tuple[list[ChosenRecord], bool]:
    """Return a sample of the records of all inputs, in their order.

    Args:
        sources: The inputs.
        count: The largest number of records.

    Returns:
        The records, and whether these are all.

    Raises:
        InputUnreadable: An input cannot be read.
    """
    kept: list[_SampledPartition] = []
    distance, is_complete = 1, True
    lines_of: dict[int, int] = {}  # by the input, the lines of its partitions with a payload
    for partition in cut(sources, _PART_BYTES):
        before = 0
        if partition.payload is not None:
            before = lines_of.get(partition.input, 0)
            lines_of[partition.input] = before + len(split_lines(partition.payload))
        if partition.index % distance:
            continue
        if len(kept) == _MOST_PARTITIONS:
            kept, distance, is_complete = kept[::2], 2 * distance, False
            if partition.index % distance:
                continue
        # Twice the final share of this partition, if those of its input have equal numbers of
        # records.
        num_of_input = sum(part.input == partition.input for part in kept)
        kept.append(_SampledPartition.of(partition, before, 2 * count // (num_of_input + 1)))
    records: list[ChosenRecord] = []
    by_input = [[*parts] for _, parts in groupby(kept, key=lambda part: part.input)]
    shares = _share(count, [sum(part.size for part in parts) for parts in by_input])
    for share, parts in zip(shares, by_input, strict=True):
        seen = taken = 0
        size = sum(part.size for part in parts)
        for part in parts:
            seen += part.size
            chosen = _spread(part.records, share * seen // max(1, size) - taken)
            taken = share * seen // max(1, size)
            is_complete &= len(chosen) == part.size
            records += chosen
    return records, is_complete


# --- the first records, and lines -----------------------------------------------------------------


def _iterate_records(sources: Sequence[Source], numbers: Iterable[int]) -> Iterator[ChosenRecord]:
    """Yield the records of some inputs, as they are read."""
    for number in numbers:
        line = 0
        for partition in cut([sources[number]], _PART_BYTES):
            for data in split_lines(read_partition(partition)):
                if data.strip():
                    yield ChosenRecord(number, line, data)
                line += 1


def _find_lines(sources: Sequence[Source], places: Sequence[tuple[str, int]]) -> list[ChosenRecord]:
    """Return the records in some lines, in their order; each input is read once."""
    wanted = [(_find_input(sources, file, line), line) for file, line in places]
    found: dict[tuple[int, int], ChosenRecord] = {}
    for number in {number for number, _ in wanted}:
        last = max(line for input_number, line in wanted if input_number == number)
        for record in _iterate_records(sources, [number]):
            if record.number >= last:
                break
            if (number, record.number + 1) in wanted:
                found[number, record.number + 1] = record
    for number, line in wanted:
        if (number, line) not in found:
            raise ConfigError(
                f"{sources[number].name} has no record in line {line:,}",
                remedy=f"name another line with {setting('line')}",
            )
    return [found[place] for place in dict.fromkeys(wanted)]


def _find_input(sources: Sequence[Source], file: str, line: int) -> int:
    """Return the index of the input with a name, or with a path that ends with it."""
    numbers = [
        number
        for number, source in enumerate(sources)
        if file in ("", source.name, source.file) or source.name.endswith(f"/{file}")
    ]
    if len(numbers) != 1:
        which = f"{len(numbers):,} inputs" if numbers else "none of the inputs"
        raise ConfigError(
            f"{setting('line', f'{file}:{line}' if file else line)} names {which}",
            remedy=f"name one of them: {setting('line', f'{sources[0].name}:{line}')}",
        )
    return numbers[0]


# --- the sample -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _SampledPartition:
    """A partition of the sample."""

    input: int  # the index of its input
    records: list[ChosenRecord]  # some of its records
    size: int  # the number of its records

    @classmethod
    def of(cls, partition: Partition, lines_before: int, most: int) -> _SampledPartition:
        """Read a partition, and keep at most some of its records.

        Args:
            partition: The partition.
            lines_before: The number of lines before a partition with a payload.
            most: The largest number of records to keep.
        """
        start = partition.start if partition.payload is None else 0
        records = [
            ChosenRecord(partition.input, lines_before + number, data, start)
            for number, data in enumerate(split_lines(read_partition(partition)))
            if data.strip()
        ]
        return cls(partition.input, _spread(records, most), len(records))


@lru_cache(maxsize=256)
def _count_lines(source: Source, start: int) -> int:
    """Return the number of lines, or of rows, of an input before a position."""
    if start == 0 or source.kind != "lines" or not is_url(source.file):
        return lines_before(dataclasses.replace(source, start=start))
    parts = takewhile(lambda part: part.start < start, cut([source], _PART_BYTES))
    return sum(len(split_lines(read_partition(part))) for part in parts)


def _position(record: ChosenRecord) -> tuple[int, int, int]:
    return record.source, record.start, record.number


def _spread(records: list[ChosenRecord], count: int) -> list[ChosenRecord]:
    """Return at most `count` records at equal distances."""
    if len(records) <= count:
        return records
    return [records[index * len(records) // count] for index in range(count)]


def _share(total: int, sizes: Sequence[int]) -> list[int]:
    """Share a number among inputs as evenly as their sizes allow.

    Example:
        total = 10, sizes = [2, 100, 100]  ->  [2, 4, 4]
    """
    shares = [0] * len(sizes)
    # The smallest ones first: what they do not need is for the others.
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    for position, index in enumerate(order):
        shares[index] = min(sizes[index], total // (len(order) - position))
        total -= shares[index]
    return shares
