"""A folder with a tiny model, and no progress bars."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import logging

from tests.sfttrain.trainer_factory import model_folder


@pytest.fixture(autouse=True, scope="package")
def _no_progress_bars() -> None:
    logging.disable_progress_bar()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """Return the folder of a tiny model with a tokenizer, shared by the tests of a module."""
    return model_folder(tmp_path_factory.mktemp("model"), tokenizer_dir)
