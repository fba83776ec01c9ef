"""The warning about a `max_length` too short for the data.

It advises a length that keeps nearly everything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sftprep.errors import SettingNames, render_settings, setting
from sftprep.shards.ledger import Ledger
from sftprep.shards.manifest import Manifest

_TOLERATED_SHARE = 0.05
"""The share of all tokens, and of the trained ones, that may be cut without a warning."""
_KEPT_SHARE = 0.99
"""The share of the trained tokens that the advised length keeps, if the model allows it."""


@dataclass(frozen=True, slots=True)
class LengthAdvice:
    """The cuts by a build's length limit, and the advised length.

    Attributes:
        cut: The share of the tokens that were cut, because their sequence was too long.
        trained_cut: The share of the trained tokens that were cut.
        max_length: The advised length.
        keeps: The share of the trained tokens that it keeps.
        model_limit: The largest length that the model accepts; None if it is not known.
    """

    cut: float
    trained_cut: float
    max_length: int
    keeps: float
    model_limit: int | None


def advise_length(manifest: Manifest) -> LengthAdvice | None:
    """Return the advice for a build; None if little is cut.

    Return None as well for builds of older versions.
    """
    ledger = manifest.accounting
    shares = _cut_shares(ledger)
    if manifest.layout == "sequences":  # whose ledger is that before the cut
        shares = (
            1 - manifest.tokens / max(1, ledger.tokens),
            1 - manifest.trained_tokens / max(1, ledger.trained_tokens),
        )
    return _advise(shares, ledger, manifest.lengths, manifest.max_length)


def advise_from_counts(
    ledger: Ledger, lengths: Mapping[str, Any], max_length: int
) -> LengthAdvice | None:
    """Return the advice for counted records; None if little is cut.

    Args:
        ledger: Their counts, after the cut.
        lengths: The histogram of their lengths before the cut, as in a manifest.
        max_length: The limit.
    """
    return _advise(_cut_shares(ledger), ledger, lengths, max_length)


def _advise(
    shares: tuple[float, float], ledger: Ledger, lengths: Mapping[str, Any], max_length: int
) -> LengthAdvice | None:
    if max(shares) <= _TOLERATED_SHARE or not lengths or not ledger.trained_in:
        return None
    bounds, kept = np.array(lengths["up_to"]), np.cumsum(lengths["trained_tokens"])
    limit = lengths["model_limit"]
    wanted = int(bounds[np.searchsorted(kept, _KEPT_SHARE * kept[-1])])
    length = max(max_length, wanted if limit is None else min(wanted, limit))
    number_kept = kept[np.searchsorted(bounds, length, side="right") - 1]
    return LengthAdvice(*shares, length, float(number_kept / kept[-1]), limit)


def length_warning(manifest: Manifest, names: SettingNames) -> list[str]:
    """Return the warning as one line; nothing if the build cuts little.

    Args:
        manifest: The manifest of the build.
        names: The form of settings.
    """
    advice = advise_length(manifest)
    if advice is None:
        return []
    text, remedies = describe_advice(advice, manifest.max_length)
    return [render_settings("; ".join((text, *remedies)), names)]


def describe_advice(advice: LengthAdvice, max_length: int) -> tuple[str, list[str]]:
    """Return what a limit cuts, and what the advice is, with references to settings.

    Args:
        advice: The advice.
        max_length: The limit.
    """
    longer = setting("max_length", advice.max_length)
    remedies = []
    if advice.max_length > max_length or advice.keeps >= _KEPT_SHARE:
        remedies.append(f"{longer} keeps {_percent(advice.keeps)} of the trained tokens")
    if advice.keeps < _KEPT_SHARE:
        split = setting("overlong", "split")
        remedies.append(f"the tokenizer allows no more, and {split} keeps all tokens")
    return _describe_cuts(max_length, advice.cut, advice.trained_cut), remedies


def cut_notice(counts: Mapping[str, int], max_length: int) -> str:
    """Return the warning about a limit that cuts much; "" if it cuts little.

    Without the lengths of all sequences, which a stream does not keep, no length can be advised.

    Args:
        counts: Counters of a stream, by the names of a ledger.
        max_length: The limit.
    """
    shares = _cut_shares(Ledger.from_counts(counts))
    if max(shares) <= _TOLERATED_SHARE:
        return ""
    return f"{_describe_cuts(max_length, *shares)}; raise {setting('max_length')}"


def _cut_shares(ledger: Ledger) -> tuple[float, float]:
    """Return the shares of all tokens, and of the trained ones, that a length limit cut."""
    cut = ledger.tokens_truncated + ledger.tokens_dropped.get("overlong", 0)
    trained_cut = ledger.trained_truncated + ledger.trained_dropped.get("overlong", 0)
    return cut / max(1, ledger.tokens_in), trained_cut / max(1, ledger.trained_in)


def _describe_cuts(max_length: int, cut: float, trained_cut: float) -> str:
    return (
        f"{setting('max_length', max_length)} removed {_percent(cut)} of all tokens and"
        f" {_percent(trained_cut)} of the trained tokens"
    )


def _percent(share: float) -> str:
    # Rounded down, so that no share below 99 % is shown as 99 %.
    return f"{math.floor(share * 1000 + 1e-9) / 10:.1f} %"
