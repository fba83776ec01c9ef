"""Plots of the benchmarks: bars for comparisons, and measures over the size of a corpus."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_OURS, _OTHERS = "#2a7f62", "#9aa0a6"


def plot_bars(
    path: Path,
    labels: Sequence[str],
    values: Sequence[float],
    *,
    ours: Sequence[bool],
    measure: str,
    log: bool = False,
) -> None:
    """Plot one horizontal bar per label.

    Args:
        path: The file to write.
        labels: The label of each bar.
        values: The length of each bar.
        ours: Whether each bar is colored as one of this project.
        measure: The label of the axis.
        log: Whether the axis is logarithmic.

    Raises:
        SystemExit: If matplotlib is not installed.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(labels) + 1))
    axes.barh(
        range(len(labels)),
        values,
        color=[_OURS if is_ours else _OTHERS for is_ours in ours],
        log=log,
    )
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel(measure + (" (log)" if log else ""))
    # The axis extends beyond the longest bar, for the number next to it.
    axes.set_xlim(right=max(values) * (1.5 if log else 1.1))
    for position, value in enumerate(values):
        axes.annotate(f" {value:,.3g}", (value, position), va="center")
    _save(figure, path)


def plot_over_size(
    path: Path, sizes: Sequence[float], values: dict[str, Sequence[float]], *, size: str
) -> None:
    """Plot one panel per measure over the size of the corpus, on a logarithmic axis.

    Args:
        path: The file to write.
        sizes: The sizes of the corpora.
        values: The values of each measure, by its label.
        size: The label of the axis of sizes.

    Raises:
        SystemExit: If matplotlib is not installed.
    """
    pyplot = _pyplot()
    figure, panels = pyplot.subplots(
        1, len(values), figsize=(4.5 * len(values), 3.2), squeeze=False
    )
    for axes, (measure, series) in zip(panels[0], values.items(), strict=True):
        axes.plot(sizes, series, marker="o", color=_OURS)
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_xlabel(size)
        axes.set_ylabel(measure)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("plots need a package: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
