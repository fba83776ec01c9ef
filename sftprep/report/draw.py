"""A view of one pack for the terminal.

It shows the sequences of the pack, their records, and the trained tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from sftprep.core.types import Flag
from sftprep.errors import ShardError, escape_control, format_count
from sftprep.shards.manifest import Manifest
from sftprep.shards.reader import Pack
from sftprep.shards.writer import count_targets

_BAR_CELLS = 64
_HEAD_LINES, _TAIL_LINES = 7, 6  # of a text that is abridged
_MOST_COLUMNS = 400  # of a line that is abridged

_GREEN, _DIM, _RESET = "\x1b[32m", "\x1b[2m", "\x1b[0m"


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
        targets = f"{np.count_nonzero(mask[1:]):,} trained{_describe_weights(pack, start, end)}"
        ids = pack.input_ids[start:end].tolist()
        lines += [
            "",
            f"sequence {number}: {format_count(end - start, 'token')}, {targets}, from"
            f" {file}:{line}{_describe_flags(pack, number)}",
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


_FLAGS = {
    Flag.TRUNCATED: "truncated",
    Flag.SPLIT: "a part of a longer sequence",
    Flag.REPEATED: "repeated",
    Flag.CONTENT_NOT_SHOWN: "the chat template dropped a part of the record",
}


def _describe_flags(pack: Pack, number: int) -> str:
    """Return what the flags of a sequence say; "" if it has none."""
    flags = 0 if pack.flags is None else int(pack.flags[number])
    described = [text for flag, text in _FLAGS.items() if flags & flag]
    return f" ({', '.join(described)})" if described else ""


def _describe_weights(pack: Pack, start: int, end: int) -> str:
    """Return the distinct loss weights of a sequence's trained tokens.

    Return "" if all are 1.
    """
    if pack.loss_weights is None:
        return ""
    trained = pack.loss_weights[start:end][pack.completion_mask[start:end]].tolist()
    weights = list(dict.fromkeys(trained))
    if weights in ([], [1.0]):
        return ""
    return f" (weights {', '.join(f'{weight:g}' for weight in weights)})"


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
        cells.append(f"{_GREEN}{cell}{_RESET}" if color and is_trained else cell)
    return f"[{''.join(cells)}]"


def _text_lines(
    ids: list[int], mask: list[bool], decode: Callable[[list[int]], str], *, color: bool, full: bool
) -> list[str]:
    """Return the text of a sequence as lines, with the trained parts marked."""
    parts = []
    for trained, run in _runs(ids, mask):
        text = escape_control(decode(run))
        if color:
            # A color ends at the end of its line, so that it never affects what follows an abridged
            # text, or the rest of a pager.
            start = _GREEN if trained else _DIM
            lines = text.split("\n")
            parts.append("\n".join(f"{start}{line}{_RESET}" if line else "" for line in lines))
        else:
            parts.append(f"⟦{text}⟧" if trained else text)
    lines = "".join(parts).split("\n")
    omitted = len(lines) - _HEAD_LINES - _TAIL_LINES
    if not full and omitted > 1:
        note = f"… {omitted} lines omitted (--full shows them) …"
        lines = [*lines[:_HEAD_LINES], note, *lines[-_TAIL_LINES:]]
    return [f"  {_abridge(line, full=full)}" for line in lines]


def _abridge(line: str, *, full: bool) -> str:
    if full or len(line) <= _MOST_COLUMNS:
        return line
    return line[:_MOST_COLUMNS] + (_RESET if "\x1b" in line else "") + " …"


def _runs(ids: list[int], mask: list[bool]) -> list[tuple[bool, list[int]]]:
    """Return the runs of tokens with the same mask: (is trained, ids)."""
    runs: list[tuple[bool, list[int]]] = []
    for token, trained in zip(ids, mask, strict=True):
        if not runs or runs[-1][0] != trained:
            runs.append((trained, []))
        runs[-1][1].append(token)
    return runs
