"""Is a build whole? Digests, schema and invariants of every shard, and the accounts of the
manifest."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa

from sftprep.core.regular_files import open_regular_file
from sftprep.errors import ManifestError, ShardError
from sftprep.shards.layout import EVAL_FOLDER, SHARD_FOLDER
from sftprep.shards.manifest import Accounting, Manifest, ShardInfo, read_manifest
from sftprep.shards.reader import map_shard
from sftprep.shards.schema import numpy_view, position_dtype
from sftprep.shards.writer import count_targets, positions_of


@dataclass(slots=True)
class Verification:
    """What `verify` found. problems: empty for a build that is whole."""

    folder: Path
    shards: int = 0
    rows: int = 0
    tokens: int = 0
    sequences: int = 0
    trained_tokens: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(
    folder: str | os.PathLike[str], *, progress: Callable[[int, int], None] = lambda *_: None
) -> Verification:
    """Check a build, all of it. Raises ManifestError where the folder is no build; what is wrong
    inside is in `problems`."""
    root = Path(folder)
    manifest = read_manifest(root)
    found = Verification(root)
    for number, info in enumerate(manifest.shards, 1):
        try:
            _verify_shard(root / SHARD_FOLDER / info.name, info, manifest, found)
        except ShardError as error:
            found.problems.append(error.message)
        progress(number, len(manifest.shards))
    accounts = manifest.accounting
    found.problems += [
        f"the manifest's accounts do not balance: {text} does not hold" for text in accounts.check()
    ]
    found.problems += _input_problems(manifest)
    found.problems += _unlisted_problems(root, manifest)
    found.problems += _eval_problems(root, manifest)
    totals = {
        "rows": (found.rows, manifest.rows),
        "tokens": (found.tokens, manifest.tokens),
        "sequences": (found.sequences, accounts.sequences + manifest.plan.get("cuts", 0)),
        "trained tokens": (found.trained_tokens, manifest.trained_tokens),
    }
    if found.shards == len(manifest.shards):
        # Where a shard could not be read its rows are missing anyway, and saying so for each sum
        # would hide what matters.
        wrong = ((name, seen, said) for name, (seen, said) in totals.items() if seen != said)
        found.problems += [
            f"the shards hold {seen:,} {name}, the manifest says {said:,}"
            for name, seen, said in wrong
        ]
    return found


def _input_problems(manifest: Manifest) -> list[str]:
    """Whether the accounts of the inputs balance, and sum to those of the build; builds of version
    1.0 have none."""
    if all(info.accounting == Accounting() for info in manifest.inputs):
        return []
    problems = [
        f"the accounts of {info.path} do not balance: {text} does not hold"
        for info in manifest.inputs
        for text in info.accounting.check()
    ]
    summed: Counter[str] = Counter()
    for info in manifest.inputs:
        summed.update(info.accounting.counts())
    if Accounting.of(summed) != manifest.accounting:
        problems.append("the accounts of the inputs do not sum to those of the build")
    return problems


def _unlisted_problems(root: Path, manifest: Manifest) -> list[str]:
    """Whether the folders of shards hold others: a pattern such as shards/*.arrow reads them too.

    A build that was killed while it replaced another one leaves such files.
    """
    try:
        evaluation = read_manifest(root / EVAL_FOLDER).shards
    except ManifestError:
        evaluation = ()
    listed = {SHARD_FOLDER: manifest.shards, f"{EVAL_FOLDER}/{SHARD_FOLDER}": evaluation}
    problems = []
    for folder, shards in listed.items():
        names = {path.name for path in (root / folder).glob("*.arrow")}
        if unlisted := sorted(names - {info.name for info in shards}):
            problems.append(
                f"{root / folder} holds files that no manifest lists: {', '.join(unlisted)}; run "
                "the build again with --overwrite, or move them away"
            )
    return problems


def _eval_problems(root: Path, manifest: Manifest) -> list[str]:
    """Whether the evaluation build beside this one belongs to it; it is verified by itself."""
    if not manifest.eval:
        return []
    place = root / str(manifest.eval.get("folder", ""))
    try:
        digest = read_manifest(place).digest if place.parent == root else ""
    except ManifestError as error:
        return [f"the evaluation build: {error.message}"]
    if digest == manifest.eval.get("digest"):
        return []
    return [
        f"the evaluation build in {place} belongs to another build than this one: run the build"
        " again"
    ]


def _verify_shard(path: Path, info: ShardInfo, manifest: Manifest, found: Verification) -> None:
    batch = map_shard(path, info, manifest.max_length, verify=True)
    with open_regular_file(path) as file:
        digest = sha256()
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    if digest.hexdigest() != info.sha256:
        raise ShardError(f"{path}: its SHA-256 is not that of the manifest", remedy="")
    _verify_rows(path, batch, manifest, found)


def _verify_rows(
    path: Path, batch: pa.RecordBatch, manifest: Manifest, found: Verification
) -> None:
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    ids = numpy_view(columns["input_ids"].values)
    mask = numpy_view(columns["completion_mask"].values)
    seq_lengths = numpy_view(columns["seq_lengths"].values)
    origin = numpy_view(columns["origin"].values)
    token_offsets = numpy_view(columns["input_ids"].offsets).astype(np.int64)
    pack_offsets = numpy_view(columns["seq_lengths"].offsets).astype(np.int64)
    lines = sum(info.lines for info in manifest.inputs)

    def row_of(sequence: int) -> int:
        return int(np.searchsorted(pack_offsets, sequence, side="right")) - 1

    def problem(text: str) -> None:
        found.problems.append(f"{path}: {text}")

    if (wrong := np.flatnonzero(seq_lengths > manifest.max_length)).size:
        problem(
            f"row {row_of(wrong[0])}: a sequence of {seq_lengths[wrong[0]]} tokens (1 to"
            f" {manifest.max_length} are allowed)"
        )
    if (wrong := np.flatnonzero(np.diff(token_offsets) > manifest.max_length)).size:
        problem(
            f"row {wrong[0]}: {np.diff(token_offsets)[wrong[0]]} tokens, more than"
            f" {manifest.max_length}"
        )
    if "loss_weights" in columns:
        weights = numpy_view(columns["loss_weights"].values)
        if not (np.isfinite(weights).all() and ((weights > 0) == mask).all()):
            problem("loss_weights are not above 0 exactly where tokens are trained")
    if (wrong := np.flatnonzero(ids >= manifest.tokenizer["vocab_size"])).size:
        row = int(np.searchsorted(token_offsets, wrong[0], side="right")) - 1
        problem(
            f"row {row}: the token id {ids[wrong[0]]} is outside the vocabulary of"
            f" {manifest.tokenizer['vocab_size']}"
        )
    if "position_ids" in columns:
        positions = numpy_view(columns["position_ids"].values)
        if not np.array_equal(
            positions, positions_of(seq_lengths, position_dtype(manifest.max_length))
        ):
            problem("position_ids do not restart at 0 with each sequence")
    if (wrong := np.flatnonzero((origin < 0) | (origin >= lines))).size:
        problem(f"row {row_of(wrong[0])}: origin {origin[wrong[0]]} is no line of the inputs")
    found.shards += 1
    found.rows += len(pack_offsets) - 1
    found.tokens += len(ids)
    found.sequences += len(seq_lengths)
    found.trained_tokens += count_targets(mask, seq_lengths)
