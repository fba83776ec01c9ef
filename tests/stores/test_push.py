"""A build is pushed to a data set on the Hub, is read from there, and replaces only builds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from sftprep import build, open_shards, push, read_manifest, verify
from sftprep.cli import main
from sftprep.errors import (
    ConfigError,
    FormatError,
    HubError,
    ManifestError,
    OutputBusy,
    OutputExists,
    ShardError,
)
from sftprep.pipeline.output import hub as output_hub
from sftprep.shards import is_finished_build
from sftprep.shards.ownership import mark_card
from tests.sources.hub_server import Repo
from tests.sources.hub_writer import WritableHandler, WritableHub
from tests.stores.builds import example_lines, small_settings
from tests.stores.loopback_hub import digest_seen

ROOT = Path(__file__).resolve().parents[2]
NAME = "org/name"
URL = f"hf://datasets/{NAME}"


@pytest.fixture(scope="module")
def builds(tmp_path_factory, tokenizer_dir):
    """Two builds, of which the first one has evaluation records."""
    root = tmp_path_factory.mktemp("builds")
    (root / "rows.jsonl").write_bytes(example_lines(0, 12))
    for name, settings in {"a": {"eval_fraction": 0.3}, "b": {"seed": 5}}.items():
        build(
            str(root / "rows.jsonl"),
            output=str(root / name),
            **small_settings(tokenizer_dir, **settings),
        )
    return root


def files(hub: WritableHub, name: str = NAME, branch: str = "main") -> dict[str, bytes]:
    found = hub.repos["datasets", name].find(branch)
    assert found is not None
    return found[1]


def local_files(folder: Path) -> set[str]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix() for path in found}


def test_a_pushed_build_is_read_verified_and_up_to_date(hub, builds):
    calls = []
    pushed = push(builds / "a", NAME, progress=lambda *call: calls.append(call))
    assert pushed.url == f"{URL}@{pushed.commit}"
    assert files(hub).keys() - {".gitattributes"} == local_files(builds / "a")
    assert pushed.files == len(local_files(builds / "a"))
    assert calls[-1] == ("upload", pushed.bytes, pushed.bytes)
    local, remote = open_shards(builds / "a"), open_shards(URL)
    assert [pack.input_ids.tolist() for pack in remote] == [p.input_ids.tolist() for p in local]
    assert remote.sizes([0]).tokens.tolist() == local.sizes([0]).tokens.tolist()
    assert digest_seen(NAME) == read_manifest(builds / "a").digest
    assert is_finished_build(URL)
    again = push(builds / "a", URL)
    assert (again.files, again.commit) == (0, pushed.commit)


def test_a_reader_stays_at_the_commit_that_it_opened(hub, builds):
    push(builds / "a", NAME)
    shards = open_shards(URL)
    push(builds / "b", NAME, overwrite=True)
    assert len(list(shards)) == read_manifest(builds / "a").rows
    assert str(shards.root) != str(open_shards(URL).root)


def test_commits_have_at_most_the_limit_of_files_and_the_manifest_is_last(hub, builds, monkeypatch):
    monkeypatch.setattr(output_hub, "_FILES_PER_COMMIT", 3)
    push(builds / "a", NAME, message="First build")
    push(builds / "b", NAME, overwrite=True)
    repo = hub.repos["datasets", NAME]
    assert len(hub.sizes) > 4
    assert max(hub.sizes) <= 3
    seen, commit = [], repo.heads["main"]
    while commit:
        seen.append(repo.commits[commit].get("manifest.json"))
        commit = repo.parents[commit]
    changes = [new for new, old in pairwise(seen) if new != old]
    assert changes == [(builds / name / "manifest.json").read_bytes() for name in ("b", "a")]
    assert repo.messages[0].startswith("First build")


def test_every_commit_of_a_replacement_is_a_complete_build(
    hub, builds, monkeypatch, tmp_path, tokenizer_dir
):
    """Also of a build of the same records from another file, whose shards are the same."""
    monkeypatch.setattr(output_hub, "_FILES_PER_COMMIT", 1)
    (tmp_path / "other.jsonl").write_bytes((builds / "rows.jsonl").read_bytes())
    settings = small_settings(tokenizer_dir, seed=5)
    other = build(str(tmp_path / "other.jsonl"), output=str(tmp_path / "o"), **settings)
    push(builds / "b", NAME)
    push(tmp_path / "o", NAME, overwrite=True)
    seen = set()
    for commit, found in hub.repos["datasets", NAME].commits.items():
        if "manifest.json" in found:
            assert verify(f"{URL}@{commit}").problems == []
            seen.add(read_manifest(f"{URL}@{commit}").digest)
    assert seen == {read_manifest(builds / "b").digest, other.manifest.digest}


def test_only_files_of_builds_are_replaced(hub, builds):
    own = {"README.md": b"# mine", "data/a.jsonl": b"{}", "shards/notes.txt": b"x"}
    hub.repos["datasets", NAME] = Repo({"main": own})
    push(builds / "a", NAME)
    with pytest.raises(OutputExists, match="holds another finished build"):
        push(builds / "b", NAME)
    push(builds / "b", NAME, overwrite=True)
    assert files(hub).keys() - own.keys() == local_files(builds / "b") - {"README.md"}
    assert own.items() <= files(hub).items()


def test_a_separate_build_in_the_folder_eval_is_kept(hub, builds):
    own = {f"eval/{name}": (builds / "b" / name).read_bytes() for name in local_files(builds / "b")}
    hub.repos["datasets", NAME] = Repo({"main": own})
    push(builds / "b", NAME)
    assert own.items() <= files(hub).items()


def test_a_manifest_of_something_else_is_kept(hub, builds):
    hub.repos["datasets", NAME] = Repo({"main": {"manifest.json": b"{}"}})
    with pytest.raises(OutputExists, match="not that of a build"):
        push(builds / "a", NAME, overwrite=True)
    assert files(hub) == {"manifest.json": b"{}"}


CARD, OLDER_CARD = mark_card("---\n\nnew\n"), mark_card("---\n\nolder\n")


@pytest.mark.parametrize(
    ("before", "is_replaced"),
    [(None, True), (OLDER_CARD, True), (b"# about sftprep", False), (OLDER_CARD + b"mine", False)],
)
def test_a_readme_of_a_user_is_kept(hub, builds, tmp_path, before, is_replaced):
    folder = tmp_path / "build"
    folder.mkdir()
    for name in local_files(builds / "b"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(builds / "b" / name, folder / name)
    (folder / "README.md").unlink(missing_ok=True)
    (folder / "README.md").write_bytes(CARD)
    if before is not None:
        hub.repos["datasets", NAME] = Repo({"main": {"README.md": before}})
    pushed = push(folder, NAME)
    assert pushed.keeps_readme is not is_replaced
    assert files(hub)["README.md"] == (CARD if is_replaced else before)
    repo = hub.repos["datasets", NAME]
    parent = repo.commits[repo.parents[repo.heads["main"]]]
    assert "manifest.json" not in parent
    assert parent.get("README.md") == before


def test_a_missing_file_is_pushed_again(hub, builds):
    push(builds / "a", NAME)
    repo = hub.repos["datasets", NAME]
    kept = {name: data for name, data in files(hub).items() if not name.endswith(".arrow")}
    repo.add_commit("main", kept, "a file is removed")
    uploads = len(hub.uploads)
    assert push(builds / "a", NAME).files == len(list((builds / "a").rglob("*.arrow")))
    assert len(hub.uploads) == uploads  # the content is still there
    assert digest_seen(NAME) == read_manifest(builds / "a").digest


def test_branches_and_private_repositories(hub, builds):
    push(builds / "a", NAME, private=True)
    assert hub.repos["datasets", NAME].private
    pushed = push(builds / "b", NAME, revision="other/branch", overwrite=True)
    assert read_manifest(URL).digest == read_manifest(builds / "a").digest
    digest = read_manifest(builds / "b").digest
    assert read_manifest(f"{URL}@other%2Fbranch").digest == digest
    assert read_manifest(f"{URL}@{pushed.commit}").digest == digest
    with pytest.raises(ConfigError, match="is a commit"):
        push(builds / "b", NAME, revision=pushed.commit)
    with pytest.raises(ConfigError, match="specify one of them"):
        push(builds / "b", f"{URL}@a", revision="b")


def test_of_two_pushes_one_is_committed(hub, builds):
    push(builds / "a", NAME)
    other = {"x.txt": b"x"}

    def commit_first():
        hub.before_commit = None
        repo = hub.repos["datasets", NAME]
        repo.add_commit("main", repo.find("main")[1] | other, "of another program")

    hub.before_commit = commit_first
    with pytest.raises(OutputBusy, match=r"org/name.*meanwhile"):
        push(builds / "b", NAME, overwrite=True)
    assert digest_seen(NAME) == read_manifest(builds / "a").digest
    push(builds / "b", NAME, overwrite=True)
    assert other.items() <= files(hub).items()


def test_a_push_loses_against_a_build_with_the_same_shards(hub, builds, monkeypatch):
    """A commit without a change has no parent to compare, so the manifest is looked at again."""
    hub.repos["datasets", NAME] = Repo({"main": {}})
    shards = {
        name: (builds / "b" / name).read_bytes()
        for name in local_files(builds / "b") - {"manifest.json"}
    }

    def commit_first(self, *_, **__):
        monkeypatch.undo()
        repo = hub.repos["datasets", NAME]
        other = (builds / "a" / "manifest.json").read_bytes()
        repo.add_commit("main", shards | {"manifest.json": other}, "another build")
        return upload(self, *_, **__)

    upload = output_hub._Upload.run
    monkeypatch.setattr(output_hub._Upload, "run", commit_first)
    with pytest.raises(OutputBusy, match="another build was committed"):
        push(builds / "b", NAME)


def test_files_that_the_repository_ignores_are_an_error(hub, builds):
    name = next(name for name in local_files(builds / "b") if name.endswith(".arrow"))
    hub.repos["datasets", NAME] = Repo({"main": {".gitignore": name.encode()}})
    with pytest.raises(HubError, match=f"lacks {name}"):
        push(builds / "b", NAME)
    assert "manifest.json" not in files(hub)


def test_damaged_local_builds_are_not_committed(hub, builds, tmp_path):
    with pytest.raises(ManifestError):
        push(tmp_path, NAME)
    with pytest.raises(ConfigError, match="only a local build"):
        push("s3://bucket/build", NAME)
    with pytest.raises(ConfigError, match="name"):
        push(builds / "b", "no-organisation")
    folder = tmp_path / "build"
    subprocess.run(["cp", "-r", str(builds / "b"), str(folder)], check=True)
    shard = next(folder.rglob("*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ShardError, match="is damaged"):
        push(folder, NAME)
    shard.unlink()
    with pytest.raises(ShardError, match="is missing"):
        push(folder, "org/other")
    assert "manifest.json" not in files(hub)
    assert ("datasets", "org/other") not in hub.repos


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        (401, "hf auth login"),
        (403, "hf auth login"),
        (404, "check the name"),
        (429, "wait some minutes"),
        (503, "run the same command again"),
        (0, "check the network"),
    ],
)
def test_a_failed_request_names_the_hub_the_repository_and_a_remedy(hub, builds, status, remedy):
    push(builds / "a", NAME)
    hub.changes, hub.fails_from, hub.status = 0, 1, status
    with pytest.raises(HubError) as caught:
        push(builds / "b", NAME, overwrite=True)
    assert "the Hub" in caught.value.message
    assert NAME in caught.value.message
    assert remedy in caught.value.remedy
    hub.fails_from = None
    assert digest_seen(NAME) == read_manifest(builds / "a").digest


def test_missing_tokens_and_networks_are_errors(hub, builds, monkeypatch):
    hub.token = "hf_other"
    with pytest.raises(HubError, match=r"org/name[\s\S]*hf auth login"):
        push(builds / "a", NAME)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"org/name[\s\S]*unset HF_HUB_OFFLINE"):
        push(builds / "a", NAME)
    with pytest.raises(HubError, match=r"org/name[\s\S]*unset HF_HUB_OFFLINE"):
        open_shards(URL)
    assert not is_finished_build(URL)


def test_too_many_files_are_refused_before_the_upload(hub, builds, monkeypatch):
    monkeypatch.setattr(output_hub, "_FILES_PER_FOLDER", 1)
    with pytest.raises(ConfigError, match="raise group_bytes"):
        push(builds / "a", NAME)
    assert not hub.uploads


# --- reading --------------------------------------------------------------------------------------


def test_damage_on_the_hub_is_detected(hub, builds):
    push(builds / "b", NAME)
    repo = hub.repos["datasets", NAME]
    name = next(name for name in files(hub) if name.endswith(".arrow"))
    damaged = bytearray(files(hub)[name])
    damaged[100] ^= 1
    repo.add_commit("main", files(hub) | {name: bytes(damaged)}, "damage")
    assert any("damaged" in problem for problem in verify(URL).problems)


def test_missing_repositories_revisions_and_builds_are_errors(hub, builds):
    push(builds / "a", NAME)
    hub.repos["datasets", "org/raw"] = Repo({"main": {"train.jsonl": example_lines(0, 2)}})
    for url, error, text in [
        ("hf://datasets/org/none", HubError, "org/none"),
        (f"{URL}@v9", HubError, "no revision 'v9'"),
        ("hf://datasets/org/raw", ManifestError, "not a finished build"),
        ("hf://models/org/name", ConfigError, "write hf://datasets/"),
        (f"{URL}:config", ConfigError, "write hf://datasets/"),
    ]:
        with pytest.raises(error, match=text):
            open_shards(url)
    assert not is_finished_build("hf://datasets/org/raw")
    assert not is_finished_build("hf://datasets/org/raw:config/train")


def test_a_build_is_not_raw_input(hub, builds, small, tmp_path):
    push(builds / "a", NAME)
    for name in (URL, NAME):
        with pytest.raises(FormatError, match="is a build of sftprep"):
            small(tmp_path / "o", name)


def test_the_sequences_of_a_pushed_build_are_packed_again(hub, builds, small, tmp_path):
    push(builds / "a", NAME)
    with pytest.raises(FormatError) as refused:
        small(tmp_path / "o", URL)
    command = re.search(r"sftprep build '(.*)'", str(refused.value))
    assert command is not None
    small(tmp_path / "o", command[1], max_length=4096)

    def sequences(folder: Path) -> list[list[int]]:
        return sorted(
            pack[k : k + 1].input_ids.tolist()
            for pack in open_shards(folder)
            for k in range(len(pack.seq_lengths))
        )

    assert sequences(tmp_path / "o") == sequences(builds / "a")


def test_records_of_the_hub_are_read(hub, small, tmp_path):
    hub.repos["datasets", "org/raw"] = Repo({"main": {"train.jsonl": example_lines(0, 12)}})
    report = small(tmp_path / "o", "hf://datasets/org/raw/train")
    assert report.manifest.data_digest == small(tmp_path / "p").manifest.data_digest


# --- the output of a build ------------------------------------------------------------------------


@pytest.fixture
def build_there(small, tmp_path):
    """A function that builds a few records to the Hub."""
    return lambda url=URL, **settings: small(url, scratch=str(tmp_path / "scratch"), **settings)


def test_a_build_is_written_to_the_hub(hub, small, build_there, tmp_path):
    expected = small(tmp_path / "o", eval_fraction=0.3).manifest
    report = build_there(eval_fraction=0.3)
    assert report.manifest.data_digest == expected.data_digest
    assert [shard.name for shard in report.manifest.shards] == [s.name for s in expected.shards]
    assert report.evaluation is not None
    assert len(report.evaluation.shards) >= 1
    assert digest_seen(NAME) == expected.digest
    assert hub.repos["datasets", NAME].private
    assert not [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()]
    with pytest.raises(OutputExists, match="holds another finished build"):
        build_there(seed=3)
    build_there(seed=3, overwrite=True)
    assert digest_seen(NAME) == small(tmp_path / "p", seed=3).manifest.digest
    with pytest.raises(ConfigError, match="a build is a whole repository"):
        build_there(f"{URL}/folder")


def test_a_build_is_refused_before_its_work_without_the_right_to_write(hub, build_there):
    hub.repos["datasets", NAME] = Repo({"main": {}})
    hub.token = "hf_other"
    with pytest.raises(HubError, match="hf auth login"):
        build_there()
    assert files(hub) == {}


def test_of_a_build_and_a_push_one_is_committed(hub, builds, build_there, monkeypatch):
    from sftprep.pipeline import build as build_module

    check = build_module.check_unchanged

    def push_meanwhile(inputs):
        push(builds / "a", NAME)
        check(inputs)

    monkeypatch.setattr(build_module, "check_unchanged", push_meanwhile)
    with pytest.raises(OutputBusy, match="another build was committed"):
        build_there()
    assert digest_seen(NAME) == read_manifest(builds / "a").digest


# --- the command ----------------------------------------------------------------------------------


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def test_the_command_prints_what_was_pushed(hub, builds, capsys):
    assert run("push", builds / "a", NAME, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["url"] == f"{URL}@{hub.repos['datasets', NAME].heads['main']}"
    assert printed["files"] == len(local_files(builds / "a"))
    assert run("push", builds / "a", NAME) == 0
    assert capsys.readouterr().out.startswith(f"up to date: {URL}@")
    assert run("push", builds / "b", NAME) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run("push", builds / "b", NAME, "--overwrite", "--message", "Second") == 0
    assert hub.repos["datasets", NAME].messages[-1] == "Second"
    assert run("verify", URL) == 0
    assert run("inspect", URL, "--json") == 0
    assert run("gc", URL) == 2
    hub.token = "hf_other"
    assert run("push", builds / "a", NAME, "--overwrite") == 3
    assert "hf auth login" in capsys.readouterr().err


def test_the_address_of_the_hub_comes_from_the_environment(builds, tmp_path):
    hub = WritableHub(token="hf_secret")
    server = hub.serve(WritableHandler)
    done = subprocess.run(
        [sys.executable, "-m", "sftprep", "push", str(builds / "b"), NAME],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path),
            "HF_TOKEN": "hf_secret",
            "HF_HUB_DISABLE_XET": "1",
        },
    )
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("pushed ")
    assert done.stderr == ""
    assert "manifest.json" in files(hub)
