"""A build inside a training run."""

from __future__ import annotations

import atexit
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import sftprep
from sftprep.errors import SettingNames, SftprepError, settings_shown_as
from sftprep.shards import data_warnings, length_warning, storage_errors
from sfttrain.config.setting_names import TrainerNames
from sfttrain.data.inputs import file_stamps

_LARGE_INPUT = 128 * 2**20
"""Size in bytes from which a build has several workers and a process of its own, so that its memory
is released before the training starts."""

logger = logging.getLogger(__name__)


def run_build(settings: dict[str, Any], *, name: str, rows: str | None = None) -> None:
    """Build with the settings of `sftprep.build`.

    Args:
        settings: The settings.
        name: The name of the dataset in errors, such as `train_dataset`.
        rows: The file to which the trainer wrote the rows; None for a path of the user.

    Raises:
        SftprepError: Any error of `sftprep.build`, which shows the settings of `SFTConfig`.
    """
    workers = settings["workers"]
    if workers is None:
        workers = 1 if _input_size(settings["inputs"]) < _LARGE_INPUT else None
    config = {**settings, "workers": workers}
    names = TrainerNames(name, rows)
    try:
        if workers == 1:
            with settings_shown_as(names):
                sftprep.build(sftprep.BuildConfig.of(**config))
        else:
            sftprep.build_in_subprocess(sftprep.BuildConfig.of(**config))
    except SftprepError as error:
        raise error.shown_by(names) from error


def _input_size(inputs: tuple[str, ...]) -> int:
    return sum(size for path in inputs for _, size, _ in file_stamps(path) or ())


def folder_of_process(parent: Path) -> Path:
    """Return a folder for a build of this process only; remove it at the end."""
    with storage_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=".once-", dir=parent)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder) / "build"


def log_accounting(folder: Path, name: str, names: SettingNames) -> None:
    """Log the counts of a build and its warnings.

    The log entry is a warning if tokens or records were lost.

    Args:
        folder: The folder of the build.
        name: The name of the dataset.
        names: The form in which settings and inputs are shown.
    """
    manifest = sftprep.read_manifest(folder)
    ledger = manifest.accounting
    lost = ledger.tokens_truncated + sum(ledger.tokens_dropped.values())
    trained_lost = ledger.trained_truncated + sum(ledger.trained_dropped.values())
    text = (
        f"{name}: {ledger.records:,} records, {ledger.sequences:,} sequences, {manifest.rows:,}"
        f" packs in {folder}"
    )
    details = [
        (
            f"{ledger.truncated:,} sequences cut at {manifest.max_length:,} tokens"
            if ledger.truncated
            else ""
        ),
        *(f"{count:,} dropped ({reason})" for reason, count in ledger.dropped.items()),
        *(f"{count:,} rejected ({reason})" for reason, count in ledger.rejected.items()),
    ]
    shown = "; ".join(detail for detail in details if detail)
    if lost or ledger.rejected:
        logger.warning(
            "%s; %s; %.1f%% of the tokens lost, %.1f%% of the trained tokens",
            text,
            shown,
            100 * lost / max(1, ledger.tokens_in),
            100 * trained_lost / max(1, ledger.trained_in),
        )
    else:
        logger.info("%s%s", text, f"; {shown}" if shown else "")
    for text in length_warning(manifest, names):
        logger.warning("%s: %s", name, text)
    for found in data_warnings(manifest):
        level = logging.INFO if found.severity == "note" else logging.WARNING
        logger.log(level, "%s: %s", name, found.render(names))
