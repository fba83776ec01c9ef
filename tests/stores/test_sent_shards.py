"""Shards are sent to a store or the Hub while a build runs, and removed from its scratch folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sftprep import BuildReport, build, read_manifest, verify
from sftprep.errors import OutputBusy
from sftprep.pipeline import build as build_module
from sftprep.pipeline.output import hub as output_hub
from sftprep.stores.folder import StoreFolder, folder_of
from tests.pipeline.group_inputs import spy_on_reads
from tests.stores.builds import example_lines, shard_names, small_settings
from tests.stores.failures import Killed

URL = "hf://datasets/org/name"
GROUPS = 8


class Places:
    """The outputs of builds of eight groups with several shards each, and their scratch folder.

    Args:
        url: The output.
        folder: A folder for the inputs and the scratch folder.
        tokenizer: The folder of the tokenizer.

    Attributes:
        peak: The largest number of shards in the scratch folder so far.
    """

    def __init__(self, url: str, folder: Path, tokenizer: Path) -> None:
        self.url, self._folder, self._tokenizer = url, folder, tokenizer
        self.peak = 0
        self.inputs = folder / "in"
        self.inputs.mkdir()
        for number in range(GROUPS):
            lines = example_lines(5 * number, 5 * number + 5)
            (self.inputs / f"{number}.jsonl").write_bytes(lines)

    def build(
        self, output: str | None = None, *, progress: Any = lambda *_: None, **settings: Any
    ) -> BuildReport:
        scratch = self._folder / "scratch"
        is_elsewhere = output is None

        def count_shards(*call: Any) -> None:
            self.peak = max(self.peak, len([*scratch.rglob("shard-*.arrow")]))
            progress(*call)

        return build(
            str(self.inputs),
            output=output or self.url,
            progress=count_shards,
            **small_settings(self._tokenizer, **{"shard_tokens": 300, **settings}),
            **({"scratch": str(scratch)} if is_elsewhere else {}),
        )

    def build_killed_in_group(self, number: int) -> None:
        """Run a build that is killed when it has written the first shard of a group."""
        finished = 0

        def kill(stage: str, done: int, total: int) -> None:
            nonlocal finished
            finished += stage == "write" and done == total
            if finished == number:
                raise Killed

        with pytest.raises(Killed):
            self.build(progress=kill)


@pytest.fixture(params=["memory", "hub"])
def places(request, tmp_path, tokenizer_dir, monkeypatch) -> Places:
    monkeypatch.setattr(output_hub, "_FILES_PER_COMMIT", 3)
    found = request.getfixturevalue(request.param)
    return Places(URL if request.param == "hub" else str(found), tmp_path, tokenizer_dir)


@pytest.fixture
def remove(request, places) -> Callable[[str], None]:
    """A function that removes a file from the output, as another program does."""
    if places.url != URL:
        return lambda name: StoreFolder(places.url).remove([name])
    repo = request.getfixturevalue("hub").repos

    def remove_from_hub(name: str) -> None:
        found = repo["datasets", "org/name"]
        del found.commits[found.heads["main"]][name]

    return remove_from_hub


def names_there(places: Places) -> set[str]:
    folder = folder_of(places.url)
    assert isinstance(folder, StoreFolder)
    return {name for name in folder.names() if name.endswith(".arrow")}


@pytest.mark.parametrize("layout", ["packs", "sequences"])
def test_the_scratch_folder_has_shards_of_some_groups(places, tmp_path, layout):
    settings = {"eval_fraction": 0.2, "layout": layout}
    expected = places.build(str(tmp_path / "o"), **settings).manifest
    of_a_group = max(len(group.shards) for group in expected.read_groups())
    found = places.build(**settings).manifest
    assert found.digest == expected.digest
    assert verify(str(found.folder)).problems == []
    assert len(expected.groups) == GROUPS
    # Of a group that is written, and of those whose shards are not yet a whole commit.
    assert places.peak <= of_a_group + 2
    assert places.peak < expected.num_shards / 2
    assert not [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()]


def test_a_killed_build_does_not_repeat_groups_whose_shards_were_sent(
    places, tmp_path, monkeypatch
):
    expected = places.build(str(tmp_path / "o")).manifest
    places.build_killed_in_group(5)
    sent = names_there(places)
    assert sent
    assert sent < {f"shards/{name}" for name in shard_names(expected)}
    reads = spy_on_reads(monkeypatch)
    found = places.build().manifest
    assert found.digest == expected.digest
    assert verify(str(found.folder)).ok
    assert 0 < len(reads) <= GROUPS - 3


def test_a_sent_shard_that_was_lost_is_built_again(places, remove, tmp_path, monkeypatch):
    """Another program removes it between two builds, or before the commit."""
    expected = places.build(str(tmp_path / "o")).manifest
    places.build_killed_in_group(5)
    remove(min(names_there(places)))

    check = build_module.check_unchanged

    def remove_one(inputs):
        monkeypatch.setattr(build_module, "check_unchanged", check)
        remove(min(names_there(places)))
        check(inputs)

    monkeypatch.setattr(build_module, "check_unchanged", remove_one)
    with pytest.raises(OutputBusy, match="another program has removed shards/") as caught:
        places.build()
    assert caught.value.exit_code == 3
    found = places.build().manifest
    assert found.digest == expected.digest
    assert verify(str(found.folder)).ok


def test_shards_of_a_build_with_other_settings_do_no_harm(places, tmp_path):
    places.build_killed_in_group(4)
    expected = places.build(str(tmp_path / "o"), seed=5).manifest
    found = places.build(seed=5).manifest
    assert found.digest == expected.digest
    assert verify(str(found.folder)).ok


def test_groups_with_the_same_records_keep_their_shards(places, tmp_path):
    for number in (3, 6):
        (places.inputs / f"{number}.jsonl").write_bytes(example_lines(0, 5))
    expected = places.build(str(tmp_path / "o")).manifest
    found = places.build().manifest
    assert found.digest == expected.digest
    assert verify(str(found.folder)).ok


def test_commits_of_others_while_shards_are_sent_do_no_harm(
    hub, tmp_path, tokenizer_dir, monkeypatch
):
    """A user edits a file of the repository while a build runs."""
    monkeypatch.setattr(output_hub, "_FILES_PER_COMMIT", 3)
    places = Places(URL, tmp_path, tokenizer_dir)
    left = [2]

    def commit_first() -> None:
        if left[0] > 0:
            left[0] -= 1
            repo = hub.repos["datasets", "org/name"]
            files = repo.commits[repo.heads["main"]]
            repo.add_commit("main", {**files, "notes.txt": bytes(left)}, "edit")

    hub.before_commit = commit_first
    found = places.build().manifest
    assert verify(str(found.folder)).ok
    assert read_manifest(URL).digest == found.digest
    assert max(hub.sizes) <= 3
