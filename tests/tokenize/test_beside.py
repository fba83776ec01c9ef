"""The reference encoder in a process of its own answers as it does here, and is replaced by the one here when it is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sftprep.errors import TokenizerError
from sftprep.tokenize.beside import Beside
from sftprep.tokenize.hf import HfEncoder
from tests.tokenize.made import byte_level, spec_of

TEXTS = ["the fox jumps", "", "ééé\u4e2d", "  two  blanks "]


def test_the_same_ids_and_nothing_is_loaded_here() -> None:
    spec = spec_of(byte_level())

    def never() -> HfEncoder:
        raise AssertionError

    beside = Beside(spec, never)
    for texts in (TEXTS, TEXTS[:1], []):
        want, got = HfEncoder(spec, threads=False).encode(texts), beside.encode(texts)
        assert np.array_equal(want.input_ids, got.input_ids)
        assert np.array_equal(want.offsets, got.offsets)


@pytest.mark.parametrize("when", ["before the first", "after the first"])
def test_a_child_that_is_killed_is_done_without(when: str) -> None:
    spec = spec_of(byte_level())
    beside = Beside(spec, lambda: HfEncoder(spec, threads=False))
    if when == "after the first":
        beside.encode(TEXTS)
    assert beside._child is not None
    os.kill(beside._child.pid, signal.SIGKILL)
    want = HfEncoder(spec, threads=False).encode(TEXTS)
    assert np.array_equal(beside.encode(TEXTS).input_ids, want.input_ids)
    assert np.array_equal(beside.encode(TEXTS).input_ids, want.input_ids)


def test_a_text_that_is_no_unicode_is_refused_as_ever() -> None:
    spec = spec_of(byte_level())
    with pytest.raises(TokenizerError, match="surrogate"):
        Beside(spec, lambda: HfEncoder(spec, threads=False)).encode(["\ud800"])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_child_ends_with_a_parent_that_is_killed() -> None:
    code = (
        "import time; from sftprep.tokenize.beside import Beside; from tests.tokenize.made import byte_level, spec_of\n"
        "b = Beside(spec_of(byte_level()), None); b.encode(['a']); print(b._child.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(100):
        stat = Path(f"/proc/{child}/stat")
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("the child lives on")
