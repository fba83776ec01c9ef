"""Data sets and tokenizers are read from the Hub by name, or an error says why not.

The Hub is a local server.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftprep import open_shards, read_manifest
from sftprep.errors import ConfigError
from sftprep.sources.discovery.hub import is_hub_name
from sftprep.sources.discovery.hub_splits import (
    HubConfig,
    choose_config,
    files_of_splits,
    glob_matches,
)
from sftprep.tokenize.loading.load import load_tokenizer
from tests.sources.hub_server import Hub, Repo

ROOT = Path(__file__).resolve().parents[2]


CHILD = """
import contextlib, io, json, sys
from sftprep.cli import main
results = []
for arguments in json.loads(sys.argv[1]):
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            main(arguments)
        except SystemExit as end:
            results.append((end.code, output.getvalue()))
print(json.dumps(results))
"""


def parquet(*texts: str) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": list(texts)}), sink)
    return sink.getvalue()


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


README = b"""---
configs:
- config_name: small
  data_files:
  - split: train
    path: s/*.jsonl
- config_name: default
  data_files:
    train: d/train*.jsonl
    test: ["d/test.jsonl"]
---
# About
"""


@pytest.fixture(scope="module")
def hub(tokenizer_dir):
    plain = {
        "README.md": b"# no settings",
        "data/train-00000-of-00002.parquet": parquet("one", "two"),
        "data/train-00001-of-00002.parquet": parquet("three"),
        "data/test-00000-of-00001.parquet": parquet("four"),
        "dataset_infos.json": b"{}",
        ".gitattributes": b"",
    }
    configured = {
        "README.md": README,
        "s/a.jsonl": lines("small"),
        "d/train-1.jsonl": lines("big one"),
        "d/train-2.jsonl": lines("big two"),
        "d/test.jsonl": lines("big test"),
    }
    converted = {
        "default/train_sft/0000.parquet": parquet("converted sft"),
        "default/test_sft/0000.parquet": parquet("converted test"),
    }
    files = {path.name: path.read_bytes() for path in tokenizer_dir.iterdir()}
    return Hub(
        {
            ("datasets", "org/plain"): Repo(
                {
                    "main": plain,
                    "v1": {"train.jsonl": lines("old")},
                    "refs/convert/parquet": converted,
                }
            ),
            ("datasets", "org/configured"): Repo({"main": configured}),
            ("datasets", "org/gated"): Repo({"main": plain}, gated=True),
            ("datasets", "org/large"): Repo(
                {"main": {"a.jsonl": lines(*(f"text {k}" for k in range(400)))}}
            ),
            ("datasets", "org/pictures"): Repo({"main": {"a.png": b"", "script.py": b""}}),
            ("models", "org/model"): Repo({"main": files}),
        }
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("hf")


@pytest.fixture(scope="module")
def client(hub, home, tokenizer_dir):
    """Return a function that runs `sftprep build` with the server as the Hub.

    It runs in a child process, because the address of the Hub is an environment variable.
    """
    server = hub.serve()
    load_tokenizer(str(tokenizer_dir), cache=home / "sftprep")  # so that no child has to

    def run(*builds, **environment):
        """Return the exit code and the output of each build, specified by its arguments."""
        variables = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "SFTPREP_CACHE": str(home / "sftprep"),
            **environment,
        }
        tasks = [["build", *map(str, arguments)] for arguments in builds]
        tasks = [
            task if "--tokenizer" in task else [*task, "--tokenizer", str(tokenizer_dir)]
            for task in tasks
        ]
        done = subprocess.run(
            [sys.executable, "-c", CHILD, json.dumps(tasks)],
            check=True,
            capture_output=True,
            text=True,
            env=variables,
            cwd=ROOT,
        )
        return [tuple(result) for result in json.loads(done.stdout.splitlines()[-1])]

    yield run
    server.shutdown()


def texts(folder, tokenizer_dir):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    found = []
    for pack in open_shards(folder):
        at = 0
        for length in pack.seq_lengths.tolist():
            found.append(
                tokenizer.decode(
                    pack.input_ids[at : at + length].tolist(), skip_special_tokens=True
                )
            )
            at += length
    return sorted(found)


def count_downloads(hub):
    return len([line for line in hub.requests if "/resolve/" in line and line.startswith("GET")])


def test_the_files_of_a_split_are_read_and_named_with_their_commit(
    client, hub, home, tokenizer_dir, tmp_path
):
    [(code, output)] = client(["org/plain", "--eval-split", "test", "--output", tmp_path / "o"])
    assert code == 0, output
    assert texts(tmp_path / "o", tokenizer_dir) == ["one", "three", "two"]
    assert texts(tmp_path / "o" / "eval", tokenizer_dir) == ["four"]
    commit, _ = hub.repos["datasets", "org/plain"].find("main")
    assert [i.path for i in read_manifest(tmp_path / "o").inputs] == [
        f"hf://datasets/org/plain@{commit}/data/train-0000{k}-of-00002.parquet" for k in (0, 1)
    ]
    # Files in the cache are not downloaded again, and suffice without a network.
    downloads = count_downloads(hub)
    [(code, output)] = client(["org/plain", "--output", tmp_path / "again"], HF_HUB_OFFLINE="1")
    assert code == 0, output
    assert read_manifest(tmp_path / "again").inputs == read_manifest(tmp_path / "o").inputs
    assert count_downloads(hub) == downloads
    # An incomplete data set in the cache is an error.
    blob = Path(next(home.rglob("train-00001-of-00002.parquet"))).resolve()
    kept = blob.rename(blob.with_name("moved"))
    [(code, output)] = client(["org/plain", "--output", tmp_path / "half"], HF_HUB_OFFLINE="1")
    assert (code, "not in the cache" in output) == (3, True), output
    kept.rename(blob)


def test_configurations_splits_and_revisions_are_read(client, tokenizer_dir, tmp_path):
    cases = [
        (["org/configured"], ["big one", "big two"]),
        (["hf://datasets/org/configured:small/train"], ["small"]),
        (["hf://datasets/org/configured/d/test.jsonl"], ["big test"]),
        (["org/plain", "--revision", "v1"], ["old"]),
        (["hf://datasets/org/plain@refs%2Fconvert%2Fparquet/train_sft"], ["converted sft"]),
    ]
    results = client(
        *([*arguments, "--output", tmp_path / str(n)] for n, (arguments, _) in enumerate(cases))
    )
    for number, ((_, wanted), (code, output)) in enumerate(zip(cases, results, strict=True)):
        assert code == 0, output
        assert texts(tmp_path / str(number), tokenizer_dir) == wanted


def test_each_missing_thing_is_an_error_with_a_remedy(client, tmp_path):
    cases = [
        (
            ["org/nothing"],
            2,
            "org/nothing is not a local path, and the data set org/nothing",
        ),
        (["org/gated"], 3, "is gated"),
        (["org/plain", "--revision", "v9"], 2, "has no revision 'v9'"),
        (["org/plain", "--split", "dev"], 2, "has no split 'dev'"),
        (["org/configured", "--config-name", "large"], 2, "has no configuration 'large'"),
        (["hf://datasets/org/plain/none.jsonl"], 2, "has no file none.jsonl"),
        (["org/pictures"], 2, "has .png, .py"),
        (["hf://models/org/model"], 2, "is not a data set"),
    ]
    results = client(*([*arguments, "--output", tmp_path / "o"] for arguments, _, _ in cases))
    for (_, code, wanted), (found, output) in zip(cases, results, strict=True):
        assert found == code, output
        assert wanted in output
        assert "→" in output
        assert "Traceback" not in output
    assert not (tmp_path / "o").exists()


def test_a_missing_network_is_an_error(client, hub, tmp_path):
    arguments = ["org/plain", "--output", tmp_path / "o"]
    [(code, output)] = client(arguments, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))
    assert (code, "could not be read" in output) == (3, True), output
    own = {"HF_HOME": str(tmp_path), "SFTPREP_CACHE": str(tmp_path)}
    [(code, output)] = client(arguments, HF_HUB_OFFLINE="1", **own)
    assert (code, "not in the cache" in output) == (3, True), output
    hub.broken = True
    [(code, output)] = client(arguments, HF_HOME=str(tmp_path))
    hub.broken = False
    assert (code, "could not be read" in output, "500" in output) == (3, True, True), output


def test_an_interrupted_download_is_completed(client, hub, tokenizer_dir, tmp_path):
    hub.cuts = 1
    [(code, output)] = client(["org/large", "--output", tmp_path / "o"])
    assert code == 0, output
    assert hub.cuts == 0
    assert len(texts(tmp_path / "o", tokenizer_dir)) == 400


def test_a_token_gives_access_and_is_not_written_to_any_file(client, tokenizer_dir, tmp_path):
    [(code, output)] = client(["org/gated", "--output", tmp_path / "o"], HF_TOKEN="hf_secret")
    assert code == 0, output
    assert texts(tmp_path / "o", tokenizer_dir) == ["one", "three", "two"]
    assert not [
        path for path in tmp_path.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()
    ]


def test_a_tokenizer_is_loaded_by_its_name(client, tokenizer_dir, tmp_path):
    (code, output), (missing_code, error) = client(
        ["org/plain", "--output", tmp_path / "o", "--tokenizer", "org/model"],
        ["org/plain", "--output", tmp_path / "p", "--tokenizer", "org/none"],
        SFTPREP_CACHE=str(tmp_path / "c"),
    )
    assert code == 0, output
    assert texts(tmp_path / "o", tokenizer_dir) == ["one", "three", "two"]
    assert read_manifest(tmp_path / "o").tokenizer["name"] == "org/model"
    assert missing_code == 2, error
    assert "org/none" in error
    assert "→" in error
    assert "Traceback" not in error


# --- the rules, without a network -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (
            ["data/train-00000-of-00001.parquet", "data/odd.split-00000-of-00001.parquet"],
            {"train": 1, "odd.split": 1},
        ),
        (["a.jsonl", "b.jsonl"], {"train": 2}),
        (
            ["training.csv", "dev.csv", "eval.csv", "other.csv"],
            {"train": 1, "validation": 1, "test": 1},
        ),
        (["train/x.json", "valid/x.json"], {"train": 1, "validation": 1}),
        (["my_test_file.jsonl", "constraint.jsonl"], {"test": 1}),
        (["train.jsonl", "train.parquet", "train2.parquet"], {"train": 2}),
    ],
)
def test_splits_are_determined_from_names_of_files(files, splits):
    found = files_of_splits(HubConfig("default", None), files)
    assert {split: len(members) for split, members in found.items()} == splits


def test_splits_are_those_of_datasets():
    """The rules of `datasets` itself give the same splits for typical names."""
    data_files = pytest.importorskip("datasets.data_files")
    for files in (
        [
            "data/train-00000-of-00002.parquet",
            "data/train-00001-of-00002.parquet",
            "data/test-00000-of-00001.parquet",
        ],
        ["train.jsonl", "test.jsonl", "README.md"],
        ["x/dev.jsonl", "x/train.jsonl"],
        ["a.jsonl", "b.jsonl"],
        ["validation/1.parquet", "train/1.parquet"],
        ["foo_train.csv", "foo_valid.csv", "foo_eval.csv"],
    ):
        patterns = data_files._get_data_files_patterns(
            lambda pattern, f=files: [n for n in f if glob_matches(pattern, n)]
        )
        theirs = {
            str(s): sorted({n for p in ps for n in files if glob_matches(p, n)} - {"README.md"})
            for s, ps in patterns.items()
        }
        ours = files_of_splits(HubConfig("default", None), [n for n in files if n != "README.md"])
        assert {split: sorted(members) for split, members in ours.items()} == theirs


def test_configurations_are_determined_from_the_readme_and_folders():
    assert choose_config(README.decode(), [], None, "it").splits == {
        "train": ["d/train*.jsonl"],
        "test": ["d/test.jsonl"],
    }
    many = (
        "---\nconfigs:\n- config_name: a\n  data_files: x.jsonl\n- config_name: b\n  data_dir:"
        " y\n---\n"
    )
    with pytest.raises(ConfigError, match=r"configurations a, b[\s\S]*config_name=\"a\""):
        choose_config(many, [], None, "it")
    assert choose_config(many, [], "b", "it") == HubConfig("b", None, "y/")
    assert files_of_splits(choose_config(many, [], "b", "it"), ["y/test.jsonl", "x.jsonl"]) == {
        "test": ["y/test.jsonl"]
    }
    assert choose_config("---\nnot: [yaml\n---", ["a.jsonl"], None, "it") == HubConfig(
        "default", None
    )
    assert choose_config("", ["fr/a.jsonl"], "fr", "it").folder == "fr/"


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("*.jsonl", "a.jsonl", True),
        ("*.jsonl", "x/a.jsonl", False),
        ("**/*.jsonl", "a.jsonl", True),
        ("**/*.jsonl", "x/y/a.jsonl", True),
        ("data/train-[0-9].parquet", "data/train-1.parquet", True),
        ("data/**", "data/x/y.json", True),
        ("a?c", "abc", True),
        ("a.c", "abc", False),
    ],
)
def test_patterns_match_as_on_the_hub(pattern, path, matches):
    assert glob_matches(pattern, path) is matches


@pytest.mark.parametrize(
    ("name", "of_the_hub"),
    [
        ("org/name", True),
        ("org/name@v1:small", True),
        ("hf://datasets/org/name/train", True),
        ("data/chats.jsonl", False),
        ("data/*.jsonl", False),
        ("./org/name", False),
        ("../x", False),
        ("a/b/c", False),
        ("name", False),
        ("/abs/name", False),
        ("tests/sources", False),
    ],
)
def test_names_of_the_hub_are_distinguished_from_paths(name, of_the_hub, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert is_hub_name(name) is of_the_hub
