"""One pack drawn for a terminal: its sequences, where they come from, and which tokens are
trained."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from sftprep.errors import ShardError
from sftprep.report.summary import some
from sftprep.shards.manifest import Manifest
from sftprep.shards.reader import Pack
from sftprep.shards.writer import count_targets

_WIDTH = 64


def draw_pack(
    pack: Pack,
    index: int,
    manifest: Manifest,
    decode: Callable[[list[int]], str],
    *,
    color: bool,
    full: bool,
) -> list[str]:
    """Lines that show pack number `index`: a bar of its sequences, then each sequence's text.

    decode: ids to text, special tokens included; color: trained tokens in green and the others dim,
    else trained text stands between ⟦ and ⟧; full: whole texts, else each is cut to some lines.
    """
    total = len(pack.input_ids)
    trained = count_targets(pack.completion_mask, pack.seq_lengths)
    lines = [
        (
            f"pack {index}: {some(len(pack.seq_lengths), 'sequence')}, {total:,} of"
            f" {manifest.max_length:,} tokens ({total / manifest.max_length:.1%} full), {trained:,}"
            f" trained ({trained / max(1, total):.1%})"
        ),
        _bar(pack, manifest.max_length, color=color),
    ]
    ends = np.cumsum(pack.seq_lengths)
    for number, (start, end) in enumerate(
        zip((ends - pack.seq_lengths).tolist(), ends.tolist(), strict=True)
    ):
        file, line = _located(int(pack.origin[number]), manifest)
        mask = pack.completion_mask[start:end]
        lines.append("")
        # As everywhere, the first token of a sequence counts for nothing: nothing predicts it.
        trained_here = f"{np.count_nonzero(mask[1:]):,} trained{_weights_line(pack, start, end)}"
        lines.append(
            f"sequence {number}: {some(end - start, 'token')}, {trained_here}, from {file}:{line}"
        )
        lines += _text(
            pack.input_ids[start:end].tolist(), mask.tolist(), decode, color=color, full=full
        )
    return lines


def pack_data(
    pack: Pack, index: int, manifest: Manifest, decode: Callable[[list[int]], str]
) -> dict[str, Any]:
    """The pack as JSON values: each sequence with its place of origin, its text and its runs of
    trained and other text."""
    ends = np.cumsum(pack.seq_lengths)
    sequences = []
    for number, (start, end) in enumerate(
        zip((ends - pack.seq_lengths).tolist(), ends.tolist(), strict=True)
    ):
        file, line = _located(int(pack.origin[number]), manifest)
        ids, mask = pack.input_ids[start:end].tolist(), pack.completion_mask[start:end].tolist()
        runs = [{"trained": trained, "text": decode(run)} for trained, run in _runs(ids, mask)]
        made = {"file": file, "line": line, "input_ids": ids, "completion_mask": mask, "runs": runs}
        if pack.loss_weights is not None:
            made["loss_weights"] = pack.loss_weights[start:end].tolist()
        sequences.append(made)
    return {"row": index, "tokens": len(pack.input_ids), "sequences": sequences}


def _located(origin: int, manifest: Manifest) -> tuple[str, int]:
    """File and line of a record. Raises ShardError where the inputs have no such record."""
    try:
        return manifest.locate(origin)
    except IndexError as error:
        raise ShardError(
            f"a sequence has the origin {origin}, which is not a record of the inputs",
            remedy="run `sftprep verify` on the folder, and build it again",
        ) from error


def _weights_line(pack: Pack, start: int, end: int) -> str:
    """What the trained tokens of a sequence weigh in the loss, where they do not all weigh 1: in
    order, equal ones once."""
    if pack.loss_weights is None:
        return ""
    trained = pack.loss_weights[start:end][pack.completion_mask[start:end]].tolist()
    weights = list(dict.fromkeys(trained))
    return (
        ""
        if weights in ([], [1.0])
        else f" (weights {', '.join(f'{weight:g}' for weight in weights)})"
    )


def _bar(pack: Pack, max_length: int, *, color: bool) -> str:
    """The pack's capacity as a line: one letter a sequence, upper case where most of a cell is
    trained, dots for room."""
    cells = []
    bounds = np.linspace(0, max_length, _WIDTH + 1).astype(int)
    ends = np.cumsum(pack.seq_lengths)
    for first, last in pairwise(bounds.tolist()):
        if first >= len(pack.input_ids):
            cells.append("·")
            continue
        letter = chr(ord("a") + int(np.searchsorted(ends, first, side="right")) % 26)
        trained = bool(np.mean(pack.completion_mask[first : max(last, first + 1)]) >= 0.5)
        shown = letter.upper() if trained else letter
        cells.append(f"\x1b[32m{shown}\x1b[0m" if color and trained else shown)
    return f"[{''.join(cells)}]"


def _text(
    ids: list[int], mask: list[bool], decode: Callable[[list[int]], str], *, color: bool, full: bool
) -> list[str]:
    pieces = []
    for trained, run in _runs(ids, mask):
        text = _safe(decode(run))
        if color:
            # A color ends with its line, so that a cut text or a pager never bleeds into what
            # follows.
            start = "\x1b[32m" if trained else "\x1b[2m"
            pieces.append(
                "\n".join(f"{start}{part}\x1b[0m" if part else "" for part in text.split("\n"))
            )
        else:
            pieces.append(f"⟦{text}⟧" if trained else text)
    lines = "".join(pieces).split("\n")
    if not full and len(lines) > 14:
        lines = [*lines[:7], f"… {len(lines) - 13} lines (--full shows them) …", *lines[-6:]]
    return [f"  {_cut(line, full=full)}" for line in lines]


def _cut(line: str, *, full: bool) -> str:
    limit = 400
    return (
        line
        if full or len(line) <= limit
        else line[:limit] + ("\x1b[0m" if "\x1b" in line else "") + " …"
    )


def _runs(ids: list[int], mask: list[bool]) -> list[tuple[bool, list[int]]]:
    runs: list[tuple[bool, list[int]]] = []
    for token, trained in zip(ids, mask, strict=True):
        if not runs or runs[-1][0] != trained:
            runs.append((trained, []))
        runs[-1][1].append(token)
    return runs


def _safe(text: str) -> str:
    """Text that cannot command the terminal: control and direction-changing characters become
    visible."""
    return "".join(
        c if c.isprintable() or c == "\n" else " " if c == "\t" else f"\\u{ord(c):04x}"
        for c in text
    )
