"""The reference encoder in a process of its own answers as it does here, and is replaced by the one
here when it is gone."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from pathlib import Path

import numpy as np
import pytest

from sftprep.errors import TokenizerError
from sftprep.tokenize.encoders.reference import HfEncoder
from sftprep.tokenize.equivalence.reference_client import ReferenceClient, ReferenceServer
from tests.tokenize.made import byte_level, spec_of

TEXTS = ["the fox jumps", "", "ééé\u4e2d", "  two  blanks "]


def test_the_same_ids_and_nothing_is_loaded_here() -> None:
    spec = spec_of(byte_level())

    def never() -> HfEncoder:
        raise AssertionError

    beside = ReferenceServer(spec)
    assert beside.address is not None
    for asking in (
        ReferenceClient(beside.address, never),
        ReferenceClient(pickle.loads(pickle.dumps(beside.address)), never),
    ):
        for texts in (TEXTS, TEXTS[:1], []):
            want, got = HfEncoder(spec, threads=False).encode(texts), asking.ask(texts)()
            assert np.array_equal(want.input_ids, got.input_ids)
            assert np.array_equal(want.offsets, got.offsets)


@pytest.mark.parametrize("when", ["before the first", "after the first", "no child"])
def test_a_child_that_is_gone_is_done_without(when: str) -> None:
    spec = spec_of(byte_level())
    beside = ReferenceServer(spec)
    asking = ReferenceClient(
        None if when == "no child" else beside.address, lambda: HfEncoder(spec, threads=False)
    )
    if when == "after the first":
        asking.ask(TEXTS)()
    beside.close()
    want = HfEncoder(spec, threads=False).encode(TEXTS)
    assert np.array_equal(asking.ask(TEXTS)().input_ids, want.input_ids)
    assert np.array_equal(asking.ask(TEXTS)().input_ids, want.input_ids)


def test_only_who_has_the_key_is_answered() -> None:
    spec = spec_of(byte_level())
    beside = ReferenceServer(spec)
    assert beside.address is not None
    ReferenceClient(beside.address, lambda: HfEncoder(spec, threads=False)).ask(
        TEXTS
    )()  # it listens
    with pytest.raises(AuthenticationError):
        Client(beside.address.endpoint, authkey=b"another")
    assert len(
        ReferenceClient(beside.address, lambda: HfEncoder(spec, threads=False))
        .ask(TEXTS)()
        .input_ids
    )


@pytest.mark.parametrize("gone", [False, True])
def test_an_answer_that_nobody_took_is_not_that_to_the_next_question(gone: bool) -> None:
    spec = spec_of(byte_level())
    beside = ReferenceServer(spec)
    asking = ReferenceClient(beside.address, lambda: HfEncoder(spec, threads=False))
    asking.ask(TEXTS)
    answer = asking.ask(TEXTS[:1])
    if gone:
        beside.close()
    assert np.array_equal(
        answer().input_ids, HfEncoder(spec, threads=False).encode(TEXTS[:1]).input_ids
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_fork_asks_for_itself() -> None:
    spec = spec_of(byte_level())
    beside = ReferenceServer(spec)
    asking = ReferenceClient(beside.address, lambda: HfEncoder(spec, threads=False))
    want = asking.ask(TEXTS)().input_ids
    child = os.fork()
    if not child:
        signal.alarm(20)
        os._exit(0 if np.array_equal(asking.ask(TEXTS)().input_ids, want) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert np.array_equal(asking.ask(TEXTS)().input_ids, want)


def test_nothing_is_left_behind() -> None:
    beside = ReferenceServer(spec_of(byte_level()))
    assert beside.address is not None
    folder = Path(beside.address.endpoint).parent
    beside.close()
    assert not folder.exists()


def test_a_text_that_is_no_unicode_is_refused_as_ever() -> None:
    spec = spec_of(byte_level())
    beside = ReferenceServer(spec)
    with pytest.raises(TokenizerError, match="surrogate"):
        ReferenceClient(beside.address, lambda: HfEncoder(spec, threads=False)).ask(["\ud800"])()


@pytest.mark.skipif(sys.platform == "win32", reason="a pipe of Windows stands in no folder")
def test_the_child_ends_with_a_parent_that_is_killed() -> None:
    code = (
        "import time; from sftprep.tokenize.equivalence.reference_client import"
        " ReferenceClient, ReferenceServer;"
        " from tests.tokenize.made import byte_level, spec_of\n"
        "b = ReferenceServer(spec_of(byte_level())); ReferenceClient(b.address,"
        " None).ask(['a'])()\nprint(b.address.endpoint, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    folder = Path(parent.stdout.readline().strip()).parent
    assert folder.exists()
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not folder.exists():  # the last thing that the child does
            return
        time.sleep(0.1)
    raise AssertionError("the child lives on")
