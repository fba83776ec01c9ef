"""Builds in stores: they are those of a local folder, and of several builders one commits."""

from __future__ import annotations

import datetime
import logging
import os
import pickle

import pytest

from sftprep import build, merge, open_shards, read_manifest, verify
from sftprep.cli import main
from sftprep.errors import (
    ConfigError,
    InputNotFound,
    ManifestError,
    OutputBusy,
    OutputExists,
    ShardError,
    StorageError,
)
from sftprep.pipeline import build as build_module
from sftprep.pipeline.output.garbage import collect_garbage
from sftprep.pipeline.output.store import OutputStore
from sftprep.sources import groups
from sftprep.stores.folder import StoreFolder
from tests.stores.builds import (
    example_lines,
    group_names,
    listed_names,
    put_object,
    read_object,
    shard_names,
)
from tests.stores.failures import killed_before, watched


def test_a_build_in_a_store_is_that_of_a_local_folder(store, small, tmp_path):
    local = tmp_path / "o"
    settings = {"eval_fraction": 0.3, "position_ids": False}
    expected = small(local, **settings)
    report = small(store / "o", **settings)
    assert str(report.folder) == f"{store}/o"
    assert report.manifest.digest == expected.manifest.digest
    files = {str(p.relative_to(local)): p.read_bytes() for p in local.rglob("*") if p.is_file()}
    assert (store / "o").names() == files.keys()
    assert all(read_object(store / "o", name) == content for name, content in files.items())
    for place in ("o", "o/eval"):
        assert verify(f"{store}/{place}").problems == []
        shards, local_shards = open_shards(f"{store}/{place}"), open_shards(tmp_path / place)
        assert [p.input_ids.tolist() for p in shards] == [
            p.input_ids.tolist() for p in local_shards
        ]
        assert len(pickle.loads(pickle.dumps(shards))[0].input_ids) > 0
        packs = range(len(shards))
        assert shards.sizes(packs).equals(local_shards.sizes(packs))
    assert shards.locate(0, 0) == local_shards.locate(0, 0)


def test_worker_processes_read_and_write_a_store(s3, small, tmp_path):
    s3.put([(tmp_path / "rows.jsonl", "in/a.jsonl"), (tmp_path / "rows.jsonl", "in/b.jsonl")])
    for name in "ab":
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{name}.jsonl").write_bytes((tmp_path / "rows.jsonl").read_bytes())
    expected = small(tmp_path / "o", source=tmp_path / "in").manifest
    assert len(expected.groups) == 2
    report = small(s3 / "o", source=s3 / "in", workers=2)
    assert report.manifest.data_digest == expected.data_digest
    assert verify(str(s3 / "o"), workers=2).ok


def test_a_finished_build_is_replaced_only_on_request(store, small, tmp_path):
    small(store)
    put_object(store, "notes.txt", b"mine", tmp_path)
    put_object(store, "shards/mine.arrow", b"mine", tmp_path)
    with pytest.raises(OutputExists, match="holds a finished build"):
        small(store, seed=1)
    old = store.names()
    report = small(store, seed=1, overwrite=True)
    assert verify(str(store)).ok
    expected = {f"shards/{name}" for name in shard_names(report.manifest)}
    expected |= group_names(report.manifest)
    kept = {"notes.txt", "shards/mine.arrow"}
    assert store.names() == expected | kept | {"manifest.json", "README.md"}
    assert old & expected == set()
    assert set(listed_names(store)) == {n for n in expected if n.endswith(".arrow")}


def test_requests_are_at_most_slices_and_shards_and_thirty(
    s3, small, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(groups, "PARTITION_BYTES", 1_200)
    url = put_object(s3, "a.jsonl", example_lines(0, 60), tmp_path)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="werkzeug"):
        manifest = small(s3 / "o", source=url).manifest
    requests = [text for text in caplog.messages if "HTTP/1.1" in text]
    slices = sum(len(info.slices) for info in manifest.inputs)
    assert slices > 10
    assert manifest.num_shards > 5
    assert len(requests) <= slices + manifest.num_shards + 30


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_two_builders_one_commits(store, small, tmp_path, monkeypatch, overwrite):
    if overwrite:
        small(store, seed=3)
    check = build_module.check_unchanged
    other = []

    def build_meanwhile(inputs):
        monkeypatch.setattr(build_module, "check_unchanged", check)
        scratch = str(tmp_path / "scratch")
        other.append(small(store, seed=1, overwrite=overwrite, scratch=scratch).manifest)
        check(inputs)

    monkeypatch.setattr(build_module, "check_unchanged", build_meanwhile)
    with pytest.raises(OutputBusy, match="another build was committed") as caught:
        small(store, seed=2, overwrite=overwrite)
    assert caught.value.exit_code == 3
    assert read_manifest(str(store)).digest == other[0].digest
    assert verify(str(store)).ok
    assert listed_names(store) == [f"shards/{name}" for name in shard_names(other[0])]
    # The files of the other builder are garbage.
    later = datetime.timedelta(seconds=-60)
    removed = {file.url for file in collect_garbage(str(store), later, dry_run=True)}
    assert removed == {f"{store}/{name}" for name in store.names()} - {
        f"{store}/{name}"
        for name in (
            "manifest.json",
            "README.md",
            *(f"shards/{name}" for name in shard_names(other[0])),
            *group_names(other[0]),
        )
    }
    assert removed
    collect_garbage(str(store), later)
    assert verify(str(store)).ok
    assert {file.url for file in store.list_files()}.isdisjoint(removed)


def test_two_builders_of_one_machine_do_not_share_a_scratch_folder(memory, small, monkeypatch):
    check = build_module.check_unchanged

    def build_meanwhile(inputs):
        monkeypatch.setattr(build_module, "check_unchanged", check)
        with pytest.raises(OutputBusy):
            small(memory)
        check(inputs)

    monkeypatch.setattr(build_module, "check_unchanged", build_meanwhile)
    small(memory)
    assert verify(str(memory)).ok


def test_a_killed_build_leaves_no_manifest_and_is_resumed(memory, small, monkeypatch, tmp_path):
    monkeypatch.setattr(groups, "PARTITION_BYTES", 1_200)
    assert killed_before(4, lambda: small(memory))
    with pytest.raises(ManifestError, match="no manifest"):
        read_manifest(str(memory))
    report = small(memory)
    assert report.reused == sum(len(info.slices) for info in report.manifest.inputs) > 1
    assert report.manifest.data_digest == small(tmp_path / "o").manifest.data_digest


def test_a_build_that_was_replaced_damages_nothing_by_its_cleanup(memory, small, tmp_path):
    """Between its commit and its cleanup, another build restores the first one."""
    first = small(memory, seed=1).manifest
    restored = []

    real_replace = StoreFolder.replace

    def replace(self, name, content, mark):
        is_done = real_replace(self, name, content, mark)
        if name == "manifest.json" and not restored:
            restored.append(name)
            small(memory, seed=1, overwrite=True, scratch=str(tmp_path / "scratch"))
        return is_done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoreFolder, "replace", replace)
        small(memory, seed=2, overwrite=True)
    assert read_manifest(str(memory)).digest == first.digest
    assert verify(str(memory)).ok


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("answer", ["conflict", "error"])
def test_a_commit_whose_response_was_lost_is_recognized(
    memory, small, monkeypatch, overwrite, answer
):
    if overwrite:
        small(memory, seed=3)

    def losing(method):
        def write(self, name, *arguments):
            is_done = method(self, name, *arguments)
            if name != "manifest.json":
                return is_done
            if answer == "error":
                raise StorageError("the connection was reset", remedy="")
            return False

        return write

    for name in ("create", "replace"):
        monkeypatch.setattr(StoreFolder, name, losing(getattr(StoreFolder, name)))
    report = small(memory, overwrite=overwrite)
    assert read_manifest(str(memory)).digest == report.manifest.digest
    assert verify(str(memory)).ok


def test_a_commit_that_fails_leaves_the_build_before(memory, small, monkeypatch):
    before = small(memory, seed=3).manifest

    def fail(self, name, *arguments):
        if name == "manifest.json":
            raise StorageError("the connection was reset", remedy="")
        return real(self, name, *arguments)

    real = StoreFolder.replace
    monkeypatch.setattr(StoreFolder, "replace", fail)
    with pytest.raises(StorageError, match="was reset"):
        small(memory, overwrite=True)
    assert read_manifest(str(memory)).digest == before.digest
    assert verify(str(memory)).ok


def test_a_flipped_bit_in_a_store_is_an_error(store, small, tmp_path, monkeypatch):
    manifest = small(store).manifest
    name = f"shards/{shard_names(manifest)[0]}"
    content = bytearray(read_object(store, name))
    content[len(content) // 2] ^= 1
    put_object(store, name, bytes(content), tmp_path)
    monkeypatch.setenv("SFTPREP_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ShardError, match="its content is not what was written") as caught:
        list(open_shards(str(store)))
    assert f"{store}/{name}" in caught.value.message
    assert [name in problem for problem in verify(str(store)).problems] == [True]


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_index_in_a_store_is_an_error(memory, small, tmp_path, monkeypatch, damage):
    (name,) = (n for n in group_names(small(memory).manifest) if n.endswith(".index"))
    content = read_object(memory, name)
    if damage == "missing":
        memory.remove([name])
    else:
        put_object(memory, name, content[:-9] + b"?" + content[-8:], tmp_path)
    monkeypatch.setenv("SFTPREP_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ShardError, match=r"is missing|is not what was written") as caught:
        open_shards(str(memory)).sizes([0])
    assert f"{memory}/{name}" in caught.value.message
    (problem,) = verify(str(memory)).problems
    assert f"{memory}/{name}" in problem


def test_a_forked_process_reads_a_build_that_was_opened_before(s3, small, tmp_path, monkeypatch):
    """The workers of a DataLoader are forked."""
    manifest = small(s3).manifest
    monkeypatch.setenv("SFTPREP_CACHE", str(tmp_path / "cache"))
    shards = open_shards(str(s3))
    shards[0]
    child = os.fork()
    if child == 0:
        tokens = -1
        try:
            tokens = sum(len(pack.input_ids) for pack in shards)
        finally:
            os._exit(0 if tokens == manifest.tokens else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_sfttrain_opens_a_build_in_a_store(memory, small):
    from sfttrain.cli.datasets import open_data

    manifest = small(memory).manifest
    assert len(open_data(str(memory))) == manifest.rows
    with pytest.raises(InputNotFound, match="does not exist"):
        open_data(f"{memory}/none")


def test_verify_reads_the_store_and_not_the_cache(memory, small, tmp_path):
    manifest = small(memory, on_bad_record="quarantine").manifest
    shards = open_shards(str(memory))
    first = shards[0].input_ids.tolist()
    shards.sizes([0])
    for name in (f"shards/{shard_names(manifest)[0]}", *group_names(manifest)):
        content = read_object(memory, name)
        put_object(memory, name, content[:-9] + b"?" + content[-8:], tmp_path)
        assert not verify(str(memory)).ok
        put_object(memory, name, content, tmp_path)
    memory.remove([f"shards/{shard_names(manifest)[0]}"])
    (problem,) = verify(str(memory)).problems
    assert "is missing" in problem
    assert open_shards(str(memory))[0].input_ids.tolist() == first


def test_a_place_without_a_build_is_an_error(memory, small, tmp_path):
    with pytest.raises(ManifestError, match=r"is not a finished build: it has no manifest\.json"):
        open_shards(str(memory))
    put_object(memory, "manifest.json", b"{}", tmp_path)
    with pytest.raises(ManifestError):
        open_shards(str(memory))
    with pytest.raises(OutputExists, match="is not that of a build"):
        small(memory, overwrite=True)
    assert read_object(memory, "manifest.json") == b"{}"


@pytest.mark.parametrize("killed_at", [2, 4, 6, None])
def test_files_that_the_manifest_names_are_never_written_with_other_bytes(
    memory, small, tmp_path, killed_at
):
    """The file of a group names its inputs, so that of a copy of the inputs is another one."""
    before = small(memory).manifest
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes((tmp_path / "rows.jsonl").read_bytes())

    def replace():
        small(memory, source=copy, overwrite=True)

    if killed_at is None:
        replace()
        assert read_manifest(str(memory)).inputs[0].path == str(copy)
    else:
        assert killed_before(killed_at, replace)
        assert read_manifest(str(memory)).digest == before.digest
    assert read_manifest(str(memory)).data_digest == before.data_digest
    assert verify(str(memory)).ok


def test_the_last_of_two_commits_writes_the_data_card(memory, small, monkeypatch, tmp_path):
    """Another build commits after this one, and before this one writes its card."""
    write_card, other = OutputStore._write_card, []

    def replaced_meanwhile(self, card, manifest):
        monkeypatch.setattr(OutputStore, "_write_card", write_card)
        other.append(small(memory, seed=2, overwrite=True, scratch=str(tmp_path / "s")).manifest)
        write_card(self, card, manifest)

    monkeypatch.setattr(OutputStore, "_write_card", replaced_meanwhile)
    small(memory, seed=1)
    assert read_manifest(str(memory)).digest == other[0].digest
    assert listed_names(memory) == [f"shards/{name}" for name in shard_names(other[0])]
    assert verify(str(memory)).ok


def test_a_card_that_another_build_has_just_written_stays(memory, small, monkeypatch, tmp_path):
    """Another build commits and writes its card right before this one replaces the card."""
    small(memory, seed=3)
    real, other = StoreFolder.replace, []

    def replace(self, name, content, mark):
        if name == "README.md" and not other:
            other.append(None)
            other[0] = small(memory, seed=2, overwrite=True, scratch=str(tmp_path / "s")).manifest
        return real(self, name, content, mark)

    monkeypatch.setattr(StoreFolder, "replace", replace)
    small(memory, seed=1, overwrite=True)
    assert read_manifest(str(memory)).digest == other[0].digest
    assert listed_names(memory) == [f"shards/{name}" for name in shard_names(other[0])]


def test_a_readme_of_a_user_in_a_store_stays(memory, small, tmp_path, caplog):
    put_object(memory, "README.md", b"# mine", tmp_path)
    for seed in (1, 2):
        caplog.clear()
        small(memory, seed=seed, overwrite=True)
        assert caplog.text.count("is not a data card as a build wrote it") == 1
    collect_garbage(str(memory), datetime.timedelta(seconds=-60))
    assert read_object(memory, "README.md") == b"# mine"


def test_groups_of_a_build_in_a_store_are_built_again(memory, small, tmp_path):
    """Their shards are not in a local folder, whatever receipts say."""
    small(memory)
    before = memory.names()
    report = small(memory, overwrite=True)
    assert memory.names() == before
    assert report.manifest.data_digest == small(tmp_path / "o").manifest.data_digest
    assert verify(str(memory)).ok


def test_a_build_in_a_store_is_neither_in_another_one_nor_among_other_files(
    memory, small, tmp_path
):
    small(memory / "b")
    names = (memory / "b").names()
    for inside in ("b/eval", "b/more/deep"):
        with pytest.raises(OutputExists, match=r"is inside memory://.*/b, which holds a build"):
            small(memory / inside)
    # The other way round: a build in the place of the evaluation records, or other files.
    small(memory / "c" / "eval")
    with pytest.raises(
        OutputExists, match=r"do not belong to a build in it: .*eval/manifest\.json"
    ):
        small(memory / "c", eval_fraction=0.3)
    source = put_object(memory / "d", "rows.jsonl", example_lines(0, 5), tmp_path)
    with pytest.raises(OutputExists, match=r"do not belong to a build in it: rows\.jsonl"):
        small(memory / "d")
    with pytest.raises(ConfigError, match=r"the input memory://.*/d is in the output folder"):
        build(str(memory / "d"), output=str(memory / "d"), tokenizer="unused")
    assert (memory / "b").names() == names
    assert (memory / "d").names() == {source.rpartition("/")[2]}


def test_parts_and_merges_are_for_local_folders(memory, small, tmp_path, capsys):
    rows, local, url = str(tmp_path / "rows.jsonl"), str(tmp_path / "o"), f"{memory}/o"
    small(local)
    small(url)
    part = ["build", rows, "--tokenizer", "none", "--output", f"{memory}/p", "--part", "1/2"]
    commands = [
        part,
        ["merge", local, url, "--output", str(tmp_path / "m")],
        ["merge", local, local, "--output", f"{memory}/m"],
    ]
    names = memory.names()
    for command in commands:
        with pytest.raises(SystemExit) as caught:
            main(command)
        assert caught.value.code == 2
        assert " → " in capsys.readouterr().err
    for folders, output in (([local, url], tmp_path / "m"), ([local, local], f"{memory}/m")):
        with pytest.raises(ConfigError, match="is in a store"):
            merge(*folders, output=output)
    assert memory.names() == names
    assert not (tmp_path / "m").exists()


def test_a_scratch_folder_needs_an_output_in_a_store(small, tmp_path):
    with pytest.raises(ConfigError, match="is for an output in a store"):
        small(tmp_path / "o", scratch=str(tmp_path / "s"))


def test_a_build_in_a_store_leaves_no_scratch_files(memory, small, tmp_path):
    small(memory, scratch=str(tmp_path / "s"))
    assert not (tmp_path / "s").exists()
    with watched(lambda _, make: make()):
        small(memory, scratch=str(tmp_path / "s"), overwrite=True, keep_spill=True, seed=1)
    report = small(memory, scratch=str(tmp_path / "s"), overwrite=True, max_length=128)
    assert report.reused == 1
