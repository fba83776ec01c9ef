"""A build that was damaged on purpose is an error with an explanation."""

from __future__ import annotations

import os
import random
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import xxhash

from sftprep.cli import main
from sftprep.errors import ManifestError, ShardError
from sftprep.pipeline.verify import verify
from sftprep.shards.layout import (
    GROUP_FOLDER,
    MANIFEST_NAME,
    SHARD_FOLDER,
    has_manifest,
    rejected_path,
)
from sftprep.shards.manifest import read_manifest
from sftprep.shards.reading.open_build import open_shards
from tests.shards.builds import rewritten, write_build
from tests.support import at_most


@pytest.fixture
def folder(tmp_path) -> Path:
    write_build(tmp_path / "b", [[4, 4], [3], [2, 2, 2]], shard_rows=3)
    return tmp_path / "b"


def replace_by(kind: str, path: Path) -> None:
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("read", [read_manifest, open_shards, verify])
def test_a_manifest_that_is_not_a_regular_file_is_an_error(kind, read, folder):
    replace_by(kind, folder / MANIFEST_NAME)
    with at_most(5), pytest.raises(ManifestError, match=r"manifest\.json: it is not a regular"):
        read(folder)
    with at_most(5):
        assert not has_manifest(folder / MANIFEST_NAME)


def test_the_commands_do_not_wait_for_a_manifest(folder, capsys):
    replace_by("pipe", folder / MANIFEST_NAME)
    for command in ("verify", "inspect"):
        with at_most(20), pytest.raises(SystemExit) as ended:
            main([command, str(folder)])
        assert ended.value.code == 2
        assert "it is not a regular file" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_shard_that_is_not_a_regular_file_is_an_error(kind, folder):
    path = folder / SHARD_FOLDER / read_manifest(folder).shards[0].name
    replace_by(kind, path)
    rewritten(folder, lambda m: m["shards"][0].update(bytes=0))
    with at_most(5), pytest.raises(ShardError, match=r"\.arrow is not a regular file"):
        open_shards(folder)
    with at_most(5):
        assert any("not a regular file" in problem for problem in verify(folder).problems)


def test_rejected_records_that_are_not_a_regular_file_are_a_problem(folder):
    (folder / "rejected").mkdir()
    digest = "0" * 64
    rewritten(folder, lambda m: m["groups"][0].update(rejected=digest))
    os.mkfifo(folder / rejected_path(read_manifest(folder).groups[0].key, digest))
    with at_most(5):
        problems = verify(folder).problems
    assert any("cannot read" in p and "rejected" in p for p in problems)


@pytest.mark.parametrize("depth", [900, 200_000])
def test_a_manifest_that_is_nested_too_deeply_is_an_error(depth, folder):
    text = (folder / MANIFEST_NAME).read_text()
    deep = "[" * depth + "]" * depth
    for damaged in (deep, text.replace('"config": {}', f'"config": {{"a": {deep}}}')):
        (folder / MANIFEST_NAME).write_text(damaged)
        for read in (read_manifest, open_shards, verify):
            with pytest.raises(ManifestError):
                read(folder)


def put(*path: str | int, value: object):
    """Return a change of a manifest: `value` under a path of keys."""

    def change(manifest: dict) -> None:
        *parents, last = path
        inner: object = manifest
        for key in parents:
            inner = inner[key]  # type: ignore[index]
        inner[last] = value  # type: ignore[index]

    return change


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (put("rows", value={}), "rows is an object, not a whole number"),
        (put("rows", value=[]), "rows is"),
        (put("rows", value=-1), "rows is"),
        (put("rows", value=1 << 70), "rows is"),
        (put("max_length", value=1.5), "max_length is"),
        (put("trained_tokens", value={}), "trained_tokens is"),
        (put("eval", value="x"), "eval is 'x', not an object"),
        (put("eval", value={"folder": []}), r"eval\.folder is"),
        (put("tokenizer", value=0), "tokenizer is 0"),
        (put("tokenizer", "vocab_size", value=None), r"tokenizer\.vocab_size is None"),
        (put("tokenizer", "name", value=[]), r"tokenizer\.name is"),
        (put("plan", value={"cuts": "x"}), r"plan\.cuts is 'x'"),
        (put("accounting", value=None), "accounting is None"),
        (put("accounting", "dropped", value=None), r"accounting\.dropped is None"),
        (put("accounting", "dropped", value={"a": "b"}), r"accounting\.dropped is"),
        (lambda m: m.pop("groups"), "rows is 3, and the shards that it lists have 0"),
        (put("groups", value={}), "groups is an object, not a list"),
        (put("groups", 0, "key", value="../../../../../x"), r"groups\[0\]\.key is"),
        (put("groups", 0, "rejected", value="../../../../../x"), r"groups\[0\]\.rejected is"),
        (put("groups", 0, "packs", value=[1.5]), r"groups\[0\]\.packs is \[1\.5\], not a list of"),
    ],
)
def test_a_field_of_another_type_is_an_error_with_its_name(change, field, folder):
    rewritten(folder, change)
    with pytest.raises(ManifestError, match=f"is damaged: {field}"):
        open_shards(folder)
    if "lists have" not in field:
        with pytest.raises(ManifestError, match=f"is damaged: {field}"):
            verify(folder)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (put("inputs", 0, value=[]), r"inputs\[0\] is \[\], not an object"),
        (put("inputs", value={}), "inputs is an object, not a list"),
        (put("inputs", 0, "path", value="\ud800"), r"inputs\[0\]\.path"),
        (put("inputs", 0, "accounting", "dropped", value=[]), r"inputs\[0\]\.accounting\.dropped"),
        (put("shards", 0, value=0), r"shards\[0\] is 0"),
        (put("shards", 0, "name", value=0), r"shards\[0\]\.name is 0, not text"),
        (put("shards", 0, "rows", value=-1), r"shards\[0\]\.rows is -1"),
        (put("shards", 0, "bytes", value=True), r"shards\[0\]\.bytes"),
        (put("shards", 0, "blocks", 0, value=1), r"shards\[0\]\.blocks\[0\] is 1"),
        (lambda m: m.pop("shards"), "shards is missing"),
        (put("index_digest", value="../../../../../x"), "index_digest is"),
        (lambda m: m["shards"][0]["blocks"][0].pop("xxh3"), r"shards\[0\].*xxh3 is missing"),
    ],
)
def test_a_field_of_a_group_of_another_type_is_an_error_with_its_name(change, field, folder):
    rewritten(folder, change)
    with pytest.raises(ManifestError, match=f"{'0' * 16}-[0-9a-f]{{16}}.json is damaged: {field}"):
        open_shards(folder)
    assert any("is damaged" in problem for problem in verify(folder).problems)


@pytest.mark.parametrize("read", [open_shards, verify])
def test_any_changed_byte_of_a_manifest_is_an_error(read, folder):
    path = folder / MANIFEST_NAME
    content = path.read_bytes()
    for at in range(0, len(content), 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(ManifestError):
            read(folder)


def test_a_changed_file_of_a_group_is_an_error(folder):
    (path,) = (folder / GROUP_FOLDER).glob("*.json")
    path.write_bytes(path.read_bytes().replace(b"a.jsonl", b"b.jsonl"))
    with pytest.raises(ManifestError, match=r"\.json is damaged: its content is not what was"):
        open_shards(folder)
    assert any("is damaged" in problem for problem in verify(folder).problems)
    path.unlink()
    with pytest.raises(ManifestError, match=r"cannot read .* which the manifest names"):
        open_shards(folder)
    assert any("cannot read" in problem for problem in verify(folder).problems)


def test_shards_with_other_numbers_of_rows_than_the_manifest_are_an_error(folder):
    rewritten(folder, put("rows", value=7))
    with pytest.raises(ManifestError, match="rows is 7, and the shards that it lists have 3"):
        open_shards(folder)
    rewritten(folder, put("shards", 0, "rows", value=7))
    rewritten(folder, put("groups", 0, "packs", value=[7]))
    with pytest.raises(ShardError, match="3, and the manifest says 7"):
        list(open_shards(folder))
    assert any("the manifest says 7" in problem for problem in verify(folder).problems)
    rewritten(folder, put("groups", 0, "packs", value=[3, 4]))
    with pytest.raises(ManifestError, match="are not those of its shards"):
        list(open_shards(folder))


def damage(folder: Path, draw: random.Random) -> None:
    """Change bytes of the shard, and the digests in the manifest with them."""
    (path,) = (folder / SHARD_FOLDER).rglob("*.arrow")
    content = bytearray(path.read_bytes())
    path.unlink()
    at = draw.randrange(len(content) - 8)
    value = draw.choice(
        [b"\xff" * 8, b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\0" * 8, b"\xff", b"\1"]
    )
    if draw.random() < 0.9:
        content[at : at + len(value)] = value
    else:
        del content[at:]
    digest = sha256(content).hexdigest()
    damaged = path.with_name(f"shard-00000-{digest[:16]}.arrow")
    damaged.write_bytes(content)

    def use_damaged(values: dict[str, Any]) -> None:
        (info,) = values["shards"]
        info.update(
            bytes=len(content),
            sha256=digest,
            name=damaged.relative_to(folder / SHARD_FOLDER).as_posix(),
        )
        start = 0
        for block in info["blocks"]:
            part = bytes(content[start : start + block["bytes"]])
            block.update(bytes=len(part), xxh3=xxhash.xxh3_128_hexdigest(part))
            start += len(part)

    rewritten(folder, use_damaged)


def test_damage_with_matching_digests_is_an_error_or_harmless(tmp_path):
    refused = []
    for seed in range(400):
        folder = tmp_path / str(seed)
        write_build(folder, [[4, 4], [3], [2, 2, 2]], shard_rows=3)
        damage(folder, random.Random(seed))
        verify(folder)
        try:
            shards = open_shards(folder)
            for pack in shards:
                assert pack.input_ids.min() >= 0
                assert len(pack.position_ids) == len(pack.completion_mask) == len(pack.input_ids)
                assert pack.seq_lengths.sum() == len(pack.input_ids)
                assert len(pack.origin) == len(pack.seq_lengths)
        except ShardError as error:
            refused.append(error.message)
    assert len(refused) > 50
    assert all("shard-00000" in message for message in refused)
