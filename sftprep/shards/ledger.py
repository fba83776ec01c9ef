"""The ledger of a build: what became of every line, record and token."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Ledger:
    """The ledger of a build or of one input, for lines, records and tokens.

    It says what became of each of them.

    These sums hold (`check`):

        lines = blank + records
        records + sum(extra) = sequences + sum(rejected) + sum(dropped) + sum(left_out)
        tokens_in + sum(tokens_extra)
            = tokens + tokens_truncated + sum(tokens_dropped) + sum(tokens_left_out)
        trained_in + sum(trained_extra)
            = trained_tokens + trained_truncated + sum(trained_dropped) + sum(trained_left_out)

    Dictionaries hold counts by reason, such as `{"bad_json": 2}`.
    """

    lines: int = 0
    blank: int = 0  # lines with whitespace only
    records: int = 0
    sequences: int = 0  # sequences that were packed
    rejected: dict[str, int] = field(default_factory=dict)  # records that cannot be used
    # Sequences of good records that cannot be used: overlong, without a trained token, ...; and
    # records that a transform left out, by its reason.
    dropped: dict[str, int] = field(default_factory=dict)
    # Sequences that are fine but not part of this build: held_out for the evaluation, in_training
    # already, or not_sampled by the weights of a mixture.
    left_out: dict[str, int] = field(default_factory=dict)
    # Sequences beyond one per record, by the step that made them: transform, split, repeated, ...
    extra: dict[str, int] = field(default_factory=dict)
    truncated: int = 0  # sequences that were cut to the maximum length
    tokens_in: int = 0  # tokens of all records before cutting
    tokens: int = 0  # tokens that were packed
    tokens_truncated: int = 0
    tokens_dropped: dict[str, int] = field(default_factory=dict)
    tokens_left_out: dict[str, int] = field(default_factory=dict)
    tokens_extra: dict[str, int] = field(default_factory=dict)
    # Targets of the loss. The first token of a sequence never counts, because nothing predicts it.
    trained_tokens: int = 0  # of them, those that were packed
    trained_in: int = 0  # of all records before cutting; 0 in older builds, which did not count it
    trained_truncated: int = 0
    # Those that were cut, and those that became the first token of a sequence: first_of_sequence.
    trained_dropped: dict[str, int] = field(default_factory=dict)
    trained_left_out: dict[str, int] = field(default_factory=dict)
    trained_extra: dict[str, int] = field(default_factory=dict)
    warnings: dict[str, int] = field(default_factory=dict)

    @classmethod
    def from_counts(cls, counts: Mapping[str, int]) -> Ledger:
        """Return the ledger with these flat counts.

        Args:
            counts: `rejected.bad_json` is an entry of `rejected`; unknown names are ignored.

        Example:
            Ledger.from_counts({"lines": 3, "rejected.bad_json": 1})
            ->  Ledger(lines=3, rejected={"bad_json": 1})
        """
        groups: dict[str, dict[str, int] | None] = {
            f.name: {} if f.default is dataclasses.MISSING else None
            for f in dataclasses.fields(cls)
        }
        values: dict[str, Any] = {
            name: counts.get(name, 0) if group is None else group for name, group in groups.items()
        }
        for name, number in sorted(counts.items()):
            group, dot, reason = name.partition(".")
            if dot and isinstance(values.get(group), dict):
                values[group][reason] = number
        return cls(**values)

    @classmethod
    def sum(cls, ledgers: Iterable[Ledger]) -> Ledger:
        """Return the sum of ledgers."""
        counts: Counter[str] = Counter()
        for ledger in ledgers:
            counts.update(ledger.to_counts())
        return cls.from_counts(counts)

    def to_counts(self) -> Counter[str]:
        """Return the ledger as flat, summable counts; inverse of `from_counts`."""
        flat: Counter[str] = Counter()
        for name, value in dataclasses.asdict(self).items():
            flat.update(
                {f"{name}.{reason}": n for reason, n in value.items()}
                if isinstance(value, dict)
                else {name: value}
            )
        return flat

    def check(self) -> list[str]:
        """Return the violated equations as text; an empty list if all hold."""
        problems = []
        for names in _BALANCES:
            if names[0][0] == "trained_in" and not self.trained_in:
                continue  # not counted
            left, right = ([(name, self._total(name)) for name in side] for side in names)
            if sum(n for _, n in left) != sum(n for _, n in right):
                sides = (
                    " + ".join(f"{name.replace('_', ' ')} ({number})" for name, number in side)
                    for side in (left, right)
                )
                problems.append(" = ".join(sides))
        return problems

    def _total(self, name: str) -> int:
        value = getattr(self, name)
        return sum(value.values()) if isinstance(value, dict) else int(value)


_BALANCES = (
    (("lines",), ("blank", "records")),
    (("records", "extra"), ("sequences", "rejected", "dropped", "left_out")),
    (
        ("tokens_in", "tokens_extra"),
        ("tokens", "tokens_truncated", "tokens_dropped", "tokens_left_out"),
    ),
    (
        ("trained_in", "trained_extra"),
        ("trained_tokens", "trained_truncated", "trained_dropped", "trained_left_out"),
    ),
)
"""The fields of the sums that hold, by side."""
