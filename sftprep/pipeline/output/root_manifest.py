"""The manifest of a build, from the files of its groups."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import orjson

from sftprep.config.build import BuildConfig
from sftprep.core.atomic_write import create_folder, write_bytes
from sftprep.core.hashing import digest
from sftprep.pipeline.output.tokenizer_files import stage_tokenizer
from sftprep.pipeline.passes.sequence_stats import sum_lengths
from sftprep.pipeline.prepare.manifest_fields import (
    describe_rendering,
    digest_templates,
    manifest_facts,
    manifest_settings,
)
from sftprep.pipeline.prepare.setup import Setup
from sftprep.recipe import describe_functions
from sftprep.shards.group import Group, GroupEntry, read_group
from sftprep.shards.layout import EVAL_FOLDER, index_path, rejected_path
from sftprep.shards.ledger import Ledger
from sftprep.shards.manifest import Manifest, SourceInfo
from sftprep.shards.reading.pack_settings import PackSettings
from sftprep.shards.reading.planned_shards import with_totals
from sftprep.shards.sequences.index import SequenceIndex, read_sequence_index
from sftprep.version import __version__


@dataclass(frozen=True, slots=True)
class NewGroup:
    """A group that was built.

    Attributes:
        key: Its key.
        digest: The SHA-256 of its file, in hex.
        raw_rejected: The file of its rejected records, whose lines are counted from the start of
            the group; it does not exist if there are none.
    """

    key: str
    digest: str
    raw_rejected: Path


def make_manifest(
    config: BuildConfig,
    setup: Setup,
    groups: Iterable[NewGroup],
    staging: Path,
    final: Path,
    *,
    evaluation: bool,
) -> Manifest:
    """Return the manifest of a build before its commit.

    It also writes the files of rejected records, whose lines are counted from the start of their
    input.

    Args:
        config: The settings of the build.
        setup: Its setup.
        groups: The groups, in order.
        staging: The folder with the files of the groups.
        final: The folder of the build, with those that have not changed since the previous one.
        evaluation: Whether it is the evaluation build.

    Raises:
        StorageError: A file cannot be written.
    """
    recipe = setup.recipe
    names = [each.source.name for each in setup.inputs if each.evaluation == evaluation]
    totals = Totals({each.name: each.weight for each in setup.entries})
    for each in groups:
        totals.add_new(each, staging)
    facts = manifest_facts(recipe, setup.encoder)
    stored = {} if evaluation else stage_tokenizer(recipe, staging)
    manifest = Manifest(
        config={
            **manifest_settings(config, names),
            "max_length": setup.limit.max_length,
            "date": recipe.date,
        },
        config_digest=_digest_config(config, setup),
        tokenizer={**facts["tokenizer"], **stored, "max_id": totals.max_id},
        chat_template=facts["chat_template"],
        encoder=facts["encoder"],
        template=describe_rendering(digest_templates(recipe), totals.template),
        accounting=Ledger.from_counts(totals.counts),
        plan=totals.describe_plan(config.pack.packing, config.pack.seed, setup.limit.max_length),
        max_length=setup.limit.max_length,
        rows=totals.packs,
        tokens=totals.tokens,
        # Not the number in the ledger: a plan that cuts sequences makes targets first tokens.
        trained_tokens=totals.trained_tokens,
        sftprep_version=__version__,
        data_digest=totals.shards.hexdigest(),
        groups=tuple(totals.entries),
        sources=totals.sources(),
        lengths=totals.lengths,
        functions=describe_functions(setup.recipes),
        folder=staging,
        layout=config.output.layout,
    )
    return _count_packs(manifest, staging, final) if manifest.layout == "sequences" else manifest


def _count_packs(manifest: Manifest, staging: Path, final: Path) -> Manifest:
    """Return the manifest with the numbers of packs that readers plan with its settings."""

    def read_index(group: Group) -> SequenceIndex:
        is_staged = (staging / index_path(group.key, group.index_digest)).exists()
        return read_sequence_index(staging if is_staged else final, group)

    return with_totals(manifest, PackSettings.of_build(manifest), read_index)


def link_evaluation(manifest: Manifest, evaluation: Manifest | None) -> Manifest:
    """Return the manifest of a build with a link to that of its evaluation records."""
    if evaluation is None:
        return manifest
    # `sftprep verify` finds by this digest whether the two builds belong together.
    found = evaluation.digest
    link = {"folder": EVAL_FOLDER, "manifest": f"manifest-{found[:16]}.json", "digest": found}
    return dataclasses.replace(manifest, eval=link)


def _digest_config(config: BuildConfig, setup: Setup) -> str:
    return digest(
        [each.digest for each in setup.recipes],
        setup.limit.max_length,
        dataclasses.asdict(config.pack),
        config.output.position_ids,
        config.output.shard_tokens,
        config.output.group_bytes,
    )


class Totals:
    """The sums over the groups of a build."""

    def __init__(self, weights: Mapping[str, float | None]) -> None:
        """Start with no group.

        Args:
            weights: The weight of each source, by its name, in order.
        """
        self.entries: list[GroupEntry] = []
        self.counts: Counter[str] = Counter()  # of the ledger
        self.template: Counter[str] = Counter()
        self.lengths: dict[str, Any] = {}
        self.packs = self.tokens = self.trained_tokens = self.cuts = 0
        self.max_id = -1
        self.shards = sha256()  # of the digests of all shards
        self._sources = {name: (weight, Counter[str]()) for name, weight in weights.items()}
        self._last_lines = 0  # of the last input

    def add_new(self, new: NewGroup, staging: Path) -> None:
        """Add a group that was built, after those before it, and write its rejected records."""
        group = read_group(staging, new.key, new.digest, keep=False)
        # The first input of a group may continue the last one of the group before it.
        first = group.inputs[0] if group.inputs else None
        lines_before = self._last_lines if first is not None and first.start else 0
        if group.inputs:
            last = group.inputs[-1]
            self._last_lines = last.lines + (lines_before if last is first else 0)
        rejected = _write_rejected(new, lines_before, staging)
        self.add(
            group,
            GroupEntry.of(group, new.digest, lines_before=lines_before, rejected=rejected),
        )

    def add(self, group: Group, entry: GroupEntry) -> None:
        """Add a group with its entry, after those before it."""
        self.entries.append(entry)
        self.counts.update(group.accounting.to_counts())
        self.template.update(group.template)
        self.lengths = sum_lengths(self.lengths, group.lengths)
        self.packs += sum(entry.packs)
        self.tokens += entry.tokens
        self.trained_tokens += entry.trained_tokens
        self.cuts += group.plan["cuts"]
        self.max_id = max(self.max_id, -1 if group.max_id is None else group.max_id)
        for shard in group.shards:
            self.shards.update(bytes.fromhex(shard.sha256))
        for info in group.inputs:
            self._sources[info.source][1].update(info.accounting.to_counts())

    def describe_plan(self, strategy: str, seed: int, capacity: int) -> dict[str, Any]:
        """Return the field `plan` of the manifest."""
        fill = self.tokens / (self.packs * capacity) if self.packs else 1.0
        return {
            "strategy": strategy,
            "packs": self.packs,
            "fill": round(fill, 6),
            "seed": seed,
            "cuts": self.cuts,
        }

    def sources(self) -> tuple[SourceInfo, ...]:
        """Return the sources with their shares, without those of which nothing was read."""
        names = ("sequences", "tokens", "trained_tokens")
        totals = {name: max(1, self.counts[name]) for name in names}
        return tuple(
            SourceInfo(
                name=source,
                weight=weight,
                records=counts["records"],
                **{name: counts[name] for name in names},
                shares={name: round(100 * counts[name] / totals[name], 2) for name in names},
            )
            for source, (weight, counts) in self._sources.items()
            if counts["lines"]
        )


def _write_rejected(new: NewGroup, lines_before: int, staging: Path) -> str:
    """Write the rejected records of a group, with lines counted from the start of their input.

    Args:
        new: The group.
        lines_before: The lines of the input before the group.
        staging: The folder for the file, whose name contains the digest of its content.

    Returns:
        The SHA-256 of the file, in hex; "" without a file.
    """
    if not new.raw_rejected.exists():
        return ""
    content = new.raw_rejected.read_bytes()
    if lines_before:
        entries = [orjson.loads(line) for line in content.splitlines()]
        lines = (
            orjson.dumps({**entry, "line": entry["line"] + lines_before}) + b"\n"
            for entry in entries
        )
        content = b"".join(lines)
    file_digest = sha256(content).hexdigest()
    path = staging / rejected_path(new.key, file_digest)
    create_folder(path.parent)
    write_bytes(path, content)
    return file_digest
