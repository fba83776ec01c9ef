"""The same command on a finished build in a store or on the Hub writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sftprep import BuildReport, verify
from sftprep.errors import OutputExists
from sftprep.stores.folder import StoreFolder
from tests.stores.builds import put_object, read_object
from tests.stores.loopback_hub import WritableHub

URL = "hf://datasets/org/name"


def test_a_build_in_a_store(
    memory: StoreFolder, small: Callable[..., BuildReport], tmp_path: Path
) -> None:
    first = small(memory, eval_fraction=0.3)
    before = memory.list_files()
    for overwrite in (False, True):
        again = small(memory, eval_fraction=0.3, overwrite=overwrite)
        assert again.is_up_to_date
        assert again.manifest.digest == first.manifest.digest
        assert again.evaluation is not None
    assert memory.list_files() == before
    with pytest.raises(OutputExists):
        small(memory, eval_fraction=0.4)
    # A shard of another size, and one that is missing.
    name = f"shards/{first.manifest.shards[0].name}"
    put_object(memory, name, read_object(memory, name)[:-1], tmp_path)
    with pytest.raises(OutputExists):
        small(memory, eval_fraction=0.3)
    assert not small(memory, eval_fraction=0.3, overwrite=True).is_up_to_date
    assert verify(str(memory)).ok
    memory.remove([name])
    with pytest.raises(OutputExists):
        small(memory, eval_fraction=0.3)


def test_inputs_in_a_store_are_known_by_their_mark(
    memory: StoreFolder, small: Callable[..., BuildReport], tmp_path: Path
) -> None:
    rows = (tmp_path / "rows.jsonl").read_bytes()
    source = put_object(memory, "rows.jsonl", rows, tmp_path)
    small(tmp_path / "o", source)
    assert small(tmp_path / "o", source).is_up_to_date
    put_object(memory, "rows.jsonl", rows.replace(b"a", b"b", 1), tmp_path)
    with pytest.raises(OutputExists):
        small(tmp_path / "o", source)


def test_a_build_on_the_hub(
    hub: WritableHub, small: Callable[..., BuildReport], tmp_path: Path
) -> None:
    scratch = str(tmp_path / "scratch")
    first = small(URL, scratch=scratch)
    repository = hub.repos["datasets", "org/name"]
    heads, commits = dict(repository.heads), len(repository.commits)
    again = small(URL, scratch=scratch, overwrite=True)
    assert again.is_up_to_date
    assert str(again.folder) == str(first.folder)  # at the same commit
    assert (repository.heads, len(repository.commits)) == (heads, commits)
    with pytest.raises(OutputExists):
        small(URL, scratch=scratch, seed=5)
    # Another program removes a shard.
    files = dict(repository.commits[repository.heads["main"]])
    del files[next(path for path in files if path.endswith(".arrow"))]
    repository.add_commit("main", files, "")
    assert not small(URL, scratch=scratch, overwrite=True).is_up_to_date
    assert verify(URL).ok
