"""The check that the packages of the trackers in `report_to` are installed.

Trainer finds a missing package only when it creates the tracker, after the model has been loaded.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from transformers import integrations

from sftprep.errors import ConfigError, MissingDependency, setting


@dataclass(frozen=True)
class _Tracker:
    check: str
    """The function of transformers.integrations that Trainer's callback calls."""
    package: str
    """The name for pip."""


_TRACKERS = {
    "azure_ml": _Tracker("is_azureml_available", "azureml-sdk"),
    "clearml": _Tracker("is_clearml_available", "clearml"),
    "codecarbon": _Tracker("is_codecarbon_available", "codecarbon"),
    "comet_ml": _Tracker("is_comet_available", "comet-ml"),
    "dagshub": _Tracker("is_dagshub_available", "dagshub mlflow"),
    "dvclive": _Tracker("is_dvclive_available", "dvclive"),
    "flyte": _Tracker("is_flytekit_available", "flytekit"),
    "mlflow": _Tracker("is_mlflow_available", "mlflow"),
    "neptune": _Tracker("is_neptune_available", "neptune"),
    "swanlab": _Tracker("is_swanlab_available", "swanlab"),
    "tensorboard": _Tracker("is_tensorboard_available", "tensorboard"),
    "trackio": _Tracker("is_trackio_available", "trackio"),
    "wandb": _Tracker("is_wandb_available", "wandb"),
}
# Trainer switches kubeflow on by itself, through an environment variable.
_WITHOUT_PACKAGE = {"kubeflow"}


def check_trackers(names: Iterable[str]) -> None:
    """Check that each tracker is known, and its package installed.

    Args:
        names: The trackers, without "all" and "none".

    Raises:
        ConfigError: transformers has no tracker of this name.
        MissingDependency: The package of a tracker is not installed.
    """
    for name in names:
        if name in _WITHOUT_PACKAGE:
            continue
        tracker = _TRACKERS.get(name)
        if tracker is None:
            near = difflib.get_close_matches(str(name), _TRACKERS, n=1)
            raise ConfigError(
                f"{setting('report_to')} is {name!r}, which is not a tracker of transformers",
                remedy=f"did you mean {setting('report_to', near[0])}?"
                if near
                else f"choose from {', '.join(_TRACKERS)}",
            )
        if not getattr(integrations, tracker.check)():
            raise MissingDependency(tracker.package, needed_for=str(setting("report_to", name)))
