"""A tokenizer is resolved once for each state of its files; each failure has its own message."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from transformers import AutoTokenizer

from sftprep.config.cache_location import cache_dir
from sftprep.core.disk_cache import read_entry, write_entry
from sftprep.errors import MismatchError, TokenizerError
from sftprep.tokenize.loading import load
from sftprep.tokenize.loading.decode import load_decoder
from sftprep.tokenize.loading.load import load_tokenizer, read_spec
from sftprep.tokenize.loading.resolve import resolve
from sftprep.tokenize.loading.spec import tokenizer_spec
from tests.support import SHARED, needs_shared
from tests.tokenize.real_tokenizers import real_tokenizer
from tests.tokenize.small_tokenizers import CHATML, STOP, byte_level, save

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def _new_interpreters() -> Iterator[None]:
    """Start the child that loads a tokenizer as a build does, not as the other tests do."""
    with patch.object(load, "subprocess", subprocess):
        yield


class Resolved:
    """A folder with a tokenizer, and a cache in which it is resolved; copied for each test."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder, self.cache = folder, cache

    @property
    def entry(self) -> Path:
        (entry,) = (self.cache / "tokenizers").iterdir()
        return entry


@pytest.fixture(scope="session")
def resolved_once(tmp_path_factory: pytest.TempPathFactory) -> Resolved:
    place = tmp_path_factory.mktemp("resolved")
    folder = save(byte_level(), place / "made")
    spec = load_tokenizer(str(folder), cache=place / "cache")
    assert spec == tokenizer_spec(AutoTokenizer.from_pretrained(folder), name=str(folder))
    return Resolved(folder, place / "cache")


@pytest.fixture
def resolved(resolved_once: Resolved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Resolved:
    """A copy, without a Python that could resolve again: what succeeds comes from the cache."""
    shutil.copytree(resolved_once.folder.parent, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    return Resolved(tmp_path / "made", tmp_path / "cache")


def test_the_same_content_is_found_in_the_cache(resolved: Resolved, tmp_path: Path) -> None:
    spec = load_tokenizer(str(resolved.folder), cache=resolved.cache)
    assert (spec.name, spec.eos_token, spec.chat_template, spec.model_max_length) == (
        str(resolved.folder),
        STOP,
        CHATML,
        4096,
    )
    (resolved.folder / "README.md").write_text("not part of the tokenizer")
    assert load_tokenizer(str(resolved.folder), cache=resolved.cache) == spec
    # A copy elsewhere is the same tokenizer, with the name that was specified.
    copy = shutil.copytree(resolved.folder, tmp_path / "copy")
    assert load_tokenizer(str(copy), cache=resolved.cache) == dataclasses.replace(
        spec, name=str(copy)
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", "{{ 1 }}"),
        ("additional_chat_templates/rag.jinja", "{{ 2 }}"),
        ("config.json", '{"model_type": "qwen2"}'),
        ("vocab.json", "{}"),
        ("tokenizer_config.json", "{}"),
    ],
)
def test_changed_content_is_resolved_again(resolved: Resolved, name: str, content: str) -> None:
    (resolved.folder / name).parent.mkdir(exist_ok=True)
    (resolved.folder / name).write_text(content)
    with pytest.raises(TokenizerError, match="cannot start Python"):
        load_tokenizer(str(resolved.folder), cache=resolved.cache)


def test_a_damaged_entry_is_ignored(resolved: Resolved) -> None:
    whole = resolved.entry.read_bytes()
    for place in (0, 40, len(whole) // 2, len(whole) - 1):
        resolved.entry.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert read_spec(resolved.entry) is None
        with pytest.raises(TokenizerError, match="cannot start Python"):
            load_tokenizer(str(resolved.folder), cache=resolved.cache)
    resolved.entry.write_bytes(whole)
    spec = load_tokenizer(str(resolved.folder), cache=resolved.cache)
    write_entry(
        resolved.entry, {**spec.to_fields(), "unknown_field": 1}, spec.json
    )  # written by another version of this software
    assert read_spec(resolved.entry) is None


@needs_shared
def test_a_class_that_rebuilds_its_tokenizer_is_resolved_as_rebuilt() -> None:
    folder = SHARED / "tokenizers" / "qwen3"
    spec = resolve(str(folder))
    assert spec == tokenizer_spec(real_tokenizer("qwen3"), name=str(folder))
    assert (
        spec.part("decoder")
        != json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["decoder"]
    )


def test_a_wrong_name_is_explained(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "model.safetensors").write_text("")
    for name, words in (
        ("", "no tokenizer was specified"),
        (str(file), "is a file"),
        (str(tmp_path / "nowhere"), "the folder .* does not exist"),
        ("./nowhere", "the folder .* does not exist"),
        ("a/b/c", "the folder .* does not exist"),
        (str(empty), r"holds no tokenizer: none of tokenizer\.json"),
    ):
        with pytest.raises(TokenizerError, match=words) as caught:
            load_tokenizer(name, cache=tmp_path / "cache")
        assert caught.value.remedy


def test_a_damaged_tokenizer_is_an_error_with_its_name(tmp_path: Path) -> None:
    folder = save(byte_level(), tmp_path / "made")
    (folder / "tokenizer.json").write_text(
        (folder / "tokenizer.json").read_text(encoding="utf-8")[:5000], encoding="utf-8"
    )
    with pytest.raises(TokenizerError, match=r"cannot load the tokenizer of .*made") as caught:
        load_tokenizer(str(folder), cache=tmp_path / "cache")
    assert "damaged" in caught.value.remedy
    assert not (tmp_path / "cache" / "tokenizers").exists()


def test_code_in_a_repository_is_not_run(tmp_path: Path) -> None:
    folder = save(
        byte_level(),
        tmp_path / "made",
        tokenizer_class="Evil",
        auto_map={"AutoTokenizer": [None, "evil.Evil"]},
    )
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')")
    with pytest.raises(TokenizerError, match="never run"):
        resolve(str(folder))
    assert not (tmp_path / "was-run").exists()


def test_a_child_that_dies_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(byte_level(), tmp_path / "made")
    (tmp_path / "broken" / "transformers").mkdir(parents=True)
    (tmp_path / "broken" / "transformers" / "__init__.py").write_text(
        "import os, sys; print('gone', file=sys.stderr, flush=True); os._exit(9)"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    with pytest.raises(TokenizerError, match="exit code 9: gone"):
        load_tokenizer(str(folder), cache=tmp_path / "cache")


HUB = """
import sys
from pathlib import Path
from sftprep.errors import HubError
from sftprep.tokenize.loading.load import load_tokenizer
try:
    load_tokenizer("maker/absent", cache=Path(sys.argv[1]))
except HubError as error:
    print(error)
spec = load_tokenizer("maker/tiny", cache=Path(sys.argv[1]))
print(spec.name, spec.vocab_size, sorted(m for m in ("torch", "transformers") if m in sys.modules))
"""


def test_a_name_on_the_hub_without_a_network(tmp_path: Path) -> None:
    """With the cache of the Hub as after a download, and the variables that forbid the network,
    both names are really looked up."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "hub" / "models--maker--tiny"
    save(byte_level(), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    run = subprocess.run(
        [sys.executable, "-c", HUB, str(tmp_path / "cache")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "no tokenizer of that name is in the cache, and the Hub cannot be reached" in run.stdout
    assert "connect to the network" in run.stdout
    assert run.stdout.splitlines()[-1] == "maker/tiny 400 []"


def test_ids_are_decoded_only_by_the_tokenizer_that_made_them(resolved: Resolved) -> None:
    name, cache = str(resolved.folder), resolved.cache
    spec = load_tokenizer(name, cache=cache)
    ids = byte_level().encode("héllo <|im_end|>").ids
    assert load_decoder(name, spec.fingerprint, cache=cache)(ids) == "héllo <|im_end|>"
    assert (
        load_decoder(name, spec.with_eos("a").fingerprint, cache=cache)(ids) == "héllo <|im_end|>"
    )
    with pytest.raises(MismatchError, match="not the tokenizer that these shards were built with"):
        load_decoder(name, "0" * 64, cache=cache)


def test_the_location_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFTPREP_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_dir() == Path("/a")
    monkeypatch.delenv("SFTPREP_CACHE")
    assert cache_dir() == Path("/b/sftprep")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "sftprep"


def test_entries_are_complete_or_absent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = tmp_path / "deep" / "entry.json"
    assert read_entry(place) is None
    assert write_entry(place, {"a": ["é\n"]}, b"body\nof lines\n")
    assert read_entry(place) == ({"a": ["é\n"]}, b"body\nof lines\n")
    assert [path.name for path in place.parent.iterdir()] == ["entry.json"]
    whole = place.read_bytes()
    for length in range(len(whole)):
        place.write_bytes(whole[:length])
        assert read_entry(place) is None
    # A cache that cannot be written is only logged.
    (tmp_path / "file").write_text("")
    assert not write_entry(tmp_path / "file" / "entry.json", {})
    assert "cannot keep" in caplog.text


def test_reading_the_cache_imports_no_library(resolved_once: Resolved) -> None:
    code = (
        "import sys; from pathlib import Path; from sftprep.tokenize.loading.load import"
        " load_tokenizer;import sftprep.tokenize.select; load_tokenizer(sys.argv[1],"
        " cache=Path(sys.argv[2]));heavy = 'torch', 'transformers', 'tokenizers', 'numba',"
        " 'pyarrow', 'awkward', 'huggingface_hub';print([m for m in heavy if m in sys.modules])"
    )
    arguments = [sys.executable, "-c", code, str(resolved_once.folder), str(resolved_once.cache)]
    run = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
