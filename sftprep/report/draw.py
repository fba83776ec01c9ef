"""A view of one pack for the terminal.

It shows the sequences of the pack, their records, and the trained tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from sftprep.errors import ShardError, escape_control, format_count
from sftprep.report.token_text import RESET, describe_flags, describe_weights, mark_text
from sftprep.shards.manifest import Manifest
from sftprep.shards.reading.pack import Pack
from sftprep.shards.writer import count_targets

_BAR_CELLS = 64
_HEAD_LINES, _TAIL_LINES = 7, 6  # of a text that is abridged
_MOST_COLUMNS = 400  # of a line that is abridged


def draw_pack(
    pack: Pack,
    index: int,
    manifest: Manifest,
    decode: Callable[[list[int]], str],
    *,
    color: bool,
    full: bool,
) -> list[str]:
    """Return the lines for a pack: a bar of its sequences, and their text.

    Args:
        pack: The pack.
        index: Its number.
        manifest: The manifest of its build.
        decode: Converts ids to text, including special tokens.
        color: Whether trained text is green, and other text dim; without color, trained text is
            in ⟦ and ⟧.
        full: Whether to show all text; otherwise long texts are abridged.
    """
    total = len(pack.input_ids)
    trained = count_targets(pack.completion_mask, pack.seq_lengths)
    lines = [
        f"pack {index}: {format_count(len(pack.seq_lengths), 'sequence')}, {total:,} of"
        f" {manifest.max_length:,} tokens ({total / manifest.max_length:.1%} full), {trained:,}"
        f" trained ({trained / max(1, total):.1%})",
        _bar(pack, manifest.max_length, color=color),
    ]
    for number, start, end in _sequence_bounds(pack):
        file, line = _locate(int(pack.origin[number]), manifest, index)
        mask = pack.completion_mask[start:end]
        # The first token of a sequence is never a target, because nothing predicts it.
        weights = None if pack.loss_weights is None else pack.loss_weights[start:end]
        targets = f"{np.count_nonzero(mask[1:]):,} trained{describe_weights(weights, mask)}"
        flags = 0 if pack.flags is None else int(pack.flags[number])
        ids = pack.input_ids[start:end].tolist()
        lines += [
            "",
            f"sequence {number}: {format_count(end - start, 'token')}, {targets}, from"
            f" {file}:{line}{describe_flags(flags)}",
            *_text_lines(ids, mask.tolist(), decode, color=color, full=full),
        ]
    return lines


def pack_data(
    pack: Pack, index: int, manifest: Manifest, decode: Callable[[list[int]], str]
) -> dict[str, Any]:
    """Return a pack as JSON values.

    Each sequence has its file and line, its ids and mask, and its text in runs of trained and other
    text. The arguments are those of `draw_pack`.
    """
    sequences = []
    for number, start, end in _sequence_bounds(pack):
        file, line = _locate(int(pack.origin[number]), manifest, index)
        ids, mask = pack.input_ids[start:end].tolist(), pack.completion_mask[start:end].tolist()
        runs = [{"trained": trained, "text": decode(run)} for trained, run in _runs(ids, mask)]
        data = {"file": file, "line": line, "input_ids": ids, "completion_mask": mask, "runs": runs}
        if pack.loss_weights is not None:
            data["loss_weights"] = pack.loss_weights[start:end].tolist()
        if pack.flags is not None:
            data["flags"] = int(pack.flags[number])
        sequences.append(data)
    return {"row": index, "tokens": len(pack.input_ids), "sequences": sequences}


def _sequence_bounds(pack: Pack) -> Iterator[tuple[int, int, int]]:
    """Yield the number of each sequence, its first token, and its last token + 1."""
    ends = np.cumsum(pack.seq_lengths)
    starts = ends - pack.seq_lengths
    yield from zip(range(len(ends)), starts.tolist(), ends.tolist(), strict=True)


def _locate(origin: int, manifest: Manifest, pack: int) -> tuple[str, int]:
    """Return the file and line of a record, or raise ShardError if unknown."""
    try:
        return manifest.locate(origin, pack % manifest.rows)
    except IndexError as error:
        raise ShardError(
            f"a sequence has the origin {origin}, which is not a record of the inputs",
            remedy="run `sftprep verify` on the folder, and build it again",
        ) from error


def _bar(pack: Pack, max_length: int, *, color: bool) -> str:
    """Return the capacity of a pack as one line of cells.

    Each sequence has a letter, in upper case where at least half of a cell is trained; dots are
    free space.
    """
    cells = []
    bounds = np.linspace(0, max_length, _BAR_CELLS + 1).astype(int)
    ends = np.cumsum(pack.seq_lengths)
    for first, last in pairwise(bounds.tolist()):
        if first >= len(pack.input_ids):
            cells.append("·")
            continue
        letter = chr(ord("a") + int(np.searchsorted(ends, first, side="right")) % 26)
        is_trained = bool(np.mean(pack.completion_mask[first : max(last, first + 1)]) >= 0.5)
        cell = letter.upper() if is_trained else letter
        is_green = color and is_trained
        cells.append(mark_text(cell, trained=True, color=True) if is_green else cell)
    return f"[{''.join(cells)}]"


def _text_lines(
    ids: list[int], mask: list[bool], decode: Callable[[list[int]], str], *, color: bool, full: bool
) -> list[str]:
    """Return the text of a sequence as lines, with the trained parts marked."""
    parts = []
    for trained, run in _runs(ids, mask):
        text = escape_control(decode(run))
        parts.append(mark_text(text, trained=trained, color=color))
    lines = "".join(parts).split("\n")
    omitted = len(lines) - _HEAD_LINES - _TAIL_LINES
    if not full and omitted > 1:
        note = f"… {omitted} lines omitted (--full shows them) …"
        lines = [*lines[:_HEAD_LINES], note, *lines[-_TAIL_LINES:]]
    return [f"  {_abridge(line, full=full)}" for line in lines]


def _abridge(line: str, *, full: bool) -> str:
    if full or len(line) <= _MOST_COLUMNS:
        return line
    return line[:_MOST_COLUMNS] + (RESET if "\x1b" in line else "") + " …"


def _runs(ids: list[int], mask: list[bool]) -> list[tuple[bool, list[int]]]:
    """Return the runs of tokens with the same mask: (is trained, ids)."""
    runs: list[tuple[bool, list[int]]] = []
    for token, trained in zip(ids, mask, strict=True):
        if not runs or runs[-1][0] != trained:
            runs.append((trained, []))
        runs[-1][1].append(token)
    return runs
