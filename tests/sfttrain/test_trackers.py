"""The packages of trackers are checked before a model is loaded."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers.integrations import integration_utils

from sftprep.errors import ConfigError, MissingDependency
from sfttrain import SFTConfig
from sfttrain.cli.main import main
from sfttrain.config.trackers import _TRACKERS, _WITHOUT_PACKAGE, check_trackers


def test_every_tracker_of_transformers_is_known() -> None:
    assert _TRACKERS.keys() | _WITHOUT_PACKAGE == integration_utils.INTEGRATION_TO_CALLBACK.keys()
    for tracker in _TRACKERS.values():
        assert getattr(integration_utils, tracker.check)() in (True, False)


@pytest.mark.parametrize("name", sorted(_TRACKERS))
def test_a_missing_package_is_an_error_with_the_command_of_pip(name: str) -> None:
    if getattr(integration_utils, _TRACKERS[name].check)():
        pytest.skip(f"{name} is installed")
    with pytest.raises(MissingDependency) as caught:
        check_trackers([name])
    assert name in caught.value.message
    assert caught.value.remedy == f"pip install {_TRACKERS[name].package}"


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_a_run_is_refused_before_its_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "no-model")
    out = tmp_path / "out"
    command = ["run", str(tmp_path), "--model", missing, "--output_dir", str(out)]
    assert main([*command, "--report_to", "wandb"]) == 2
    assert capsys.readouterr().err == (
        "error: --report_to wandb needs the package wandb\n  → pip install wandb\n"
    )
    assert not out.exists()


def test_an_unknown_tracker_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        SFTConfig(str(tmp_path), report_to=["wandbb"])
    assert "wandb" in caught.value.remedy


@pytest.mark.parametrize("value", ["none", "all", []])
def test_no_tracker_or_all_installed_ones_are_accepted(
    value: str | list[str], tmp_path: Path
) -> None:
    assert isinstance(SFTConfig(str(tmp_path), report_to=value), SFTConfig)
