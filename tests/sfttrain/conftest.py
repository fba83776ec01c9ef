"""A folder with a tiny model, and no progress bars."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from transformers import logging

import sftprep.torch
from tests.sfttrain.trainer_factory import model_folder


@pytest.fixture(autouse=True, scope="package")
def _quiet_and_fast() -> None:
    logging.disable_progress_bar()
    gc.collect()
    gc.freeze()  # the libraries of the trainer, as in the conftest.py of all tests


@pytest.fixture(autouse=True, scope="package")
def _short_prefetch() -> Iterator[None]:
    """Prefetch more than a whole pass of these tests, and no more.

    By default a worker is asked for 4 M tokens, which are 33,000 requests for packs of 128 tokens,
    and it answers each of them even after the end of the pass.
    """
    with patch.object(sftprep.torch, "_PREFETCHED_TOKENS", 40_000):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """Return the folder of a tiny model with a tokenizer, shared by the tests of a module."""
    return model_folder(tmp_path_factory.mktemp("model"), tokenizer_dir)
