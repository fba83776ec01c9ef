"""One thread for tiny models, since more only wait for each other; a folder with such a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import logging

from tests.sfttrain.trainer_factory import model_folder


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """Return the folder of a tiny model with a tokenizer, shared by the tests of a module."""
    return model_folder(tmp_path_factory.mktemp("model"), tokenizer_dir)
