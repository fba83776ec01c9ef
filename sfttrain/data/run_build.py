"""A build inside a training run."""

from __future__ import annotations

import os
from typing import Any

import sftprep
from sftprep.errors import SftprepError
from sfttrain.config.setting_names import TrainerNames

_LARGE_INPUT = 128 * 2**20
"""Size in bytes from which a build has several workers and a process of its own, so that its memory
is released before the training starts."""


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
    try:
        if workers == 1:
            sftprep.build(sftprep.BuildConfig.of(**config))
        else:
            sftprep.build_in_subprocess(sftprep.BuildConfig.of(**config))
    except SftprepError as error:
        raise error.shown_by(TrainerNames(name, rows)) from error


def _input_size(inputs: tuple[str, ...]) -> int:
    return sum(os.path.getsize(path) for path in inputs if os.path.isfile(path))
