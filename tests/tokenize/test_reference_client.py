"""The reference encoder in a child process gives the same ids, with a local one as fallback."""

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
from tests.tokenize.small_tokenizers import byte_level, spec_of

TEXTS = ["the fox jumps", "", "ééé\u4e2d", "  two  spaces "]


def test_the_child_gives_the_same_ids_and_nothing_is_loaded_locally() -> None:
    spec = spec_of(byte_level())

    def never() -> HfEncoder:
        raise AssertionError

    server = ReferenceServer(spec)
    assert server.address is not None
    for client in (
        ReferenceClient(server.address, never),
        ReferenceClient(pickle.loads(pickle.dumps(server.address)), never),
    ):
        for texts in (TEXTS, TEXTS[:1], []):
            want, got = HfEncoder(spec, threads=False).encode(texts), client.ask(texts)()
            assert np.array_equal(want.input_ids, got.input_ids)
            assert np.array_equal(want.offsets, got.offsets)


@pytest.mark.parametrize("when", ["before the first", "after the first", "no child"])
def test_the_local_encoder_replaces_a_child_that_has_ended(when: str) -> None:
    spec = spec_of(byte_level())
    server = ReferenceServer(spec)
    client = ReferenceClient(
        None if when == "no child" else server.address, lambda: HfEncoder(spec, threads=False)
    )
    if when == "after the first":
        client.ask(TEXTS)()
    server.close()
    want = HfEncoder(spec, threads=False).encode(TEXTS)
    assert np.array_equal(client.ask(TEXTS)().input_ids, want.input_ids)
    assert np.array_equal(client.ask(TEXTS)().input_ids, want.input_ids)


def test_only_clients_with_the_key_are_answered() -> None:
    spec = spec_of(byte_level())
    server = ReferenceServer(spec)
    assert server.address is not None
    ReferenceClient(server.address, lambda: HfEncoder(spec, threads=False)).ask(
        TEXTS
    )()  # it listens
    with pytest.raises(AuthenticationError):
        Client(server.address.endpoint, authkey=b"another")
    assert len(
        ReferenceClient(server.address, lambda: HfEncoder(spec, threads=False))
        .ask(TEXTS)()
        .input_ids
    )


@pytest.mark.parametrize("gone", [False, True])
def test_an_answer_that_was_not_used_is_not_given_to_the_next_request(gone: bool) -> None:
    spec = spec_of(byte_level())
    server = ReferenceServer(spec)
    client = ReferenceClient(server.address, lambda: HfEncoder(spec, threads=False))
    client.ask(TEXTS)
    answer = client.ask(TEXTS[:1])
    if gone:
        server.close()
    assert np.array_equal(
        answer().input_ids, HfEncoder(spec, threads=False).encode(TEXTS[:1]).input_ids
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_fork_does_not_use_the_connection_of_its_parent() -> None:
    spec = spec_of(byte_level())
    server = ReferenceServer(spec)
    client = ReferenceClient(server.address, lambda: HfEncoder(spec, threads=False))
    want = client.ask(TEXTS)().input_ids
    child = os.fork()
    if not child:
        signal.alarm(20)
        os._exit(0 if np.array_equal(client.ask(TEXTS)().input_ids, want) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert np.array_equal(client.ask(TEXTS)().input_ids, want)


def test_the_folder_is_removed_on_close() -> None:
    server = ReferenceServer(spec_of(byte_level()))
    assert server.address is not None
    folder = Path(server.address.endpoint).parent
    server.close()
    assert not folder.exists()


def test_a_text_that_is_not_unicode_is_refused_as_without_a_child() -> None:
    spec = spec_of(byte_level())
    server = ReferenceServer(spec)
    with pytest.raises(TokenizerError, match="surrogate"):
        ReferenceClient(server.address, lambda: HfEncoder(spec, threads=False)).ask(["\ud800"])()


@pytest.mark.skipif(sys.platform == "win32", reason="a Windows pipe is not in a folder")
def test_the_child_ends_with_a_parent_that_is_killed() -> None:
    code = (
        "import time; from sftprep.tokenize.equivalence.reference_client import"
        " ReferenceClient, ReferenceServer;"
        " from tests.tokenize.small_tokenizers import byte_level, spec_of\n"
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
        if not folder.exists():  # removed by the child as its last action
            return
        time.sleep(0.1)
    raise AssertionError("the child is still running")
