"""Removal of what killed builds left in a store."""

from __future__ import annotations

import datetime

import pytest

from sftprep import verify
from sftprep.cli import main
from sftprep.errors import ManifestError, StorageError
from sftprep.pipeline.output.garbage import collect_garbage
from tests.stores.builds import put_object, read_object
from tests.stores.failures import killed_before


def test_garbage_is_removed_by_age_and_name(memory, small, tmp_path):
    manifest = small(memory, eval_fraction=0.3).manifest
    named = memory.names()
    key = manifest.groups[0].key
    garbage = f"shards/{key}/shard-00009-0123456789abcdef.arrow"
    for name in (garbage, "notes.txt", "shards/notes.arrow"):
        put_object(memory, name, b"x", tmp_path)
    assert collect_garbage(str(memory), datetime.timedelta(days=7)) == []
    (file,) = collect_garbage(str(memory), datetime.timedelta(seconds=-60))
    assert file.url == f"{memory}/{garbage}"
    assert memory.names() == named | {"notes.txt", "shards/notes.arrow"}
    assert verify(str(memory)).ok


def test_a_build_in_the_place_of_evaluation_records_is_no_garbage(memory, small, tmp_path):
    small(memory / "eval")
    names = memory.names()
    assert collect_garbage(str(memory), datetime.timedelta(0)) == []
    assert memory.names() == names
    assert verify(str(memory / "eval")).ok


def test_garbage_is_kept_if_the_manifest_cannot_be_read(memory, small, tmp_path):
    small(memory)
    content = read_object(memory, "manifest.json")
    put_object(memory, "manifest.json", content[:-1], tmp_path)
    names = memory.names()
    with pytest.raises(ManifestError):
        collect_garbage(str(memory), datetime.timedelta(seconds=-60))
    assert memory.names() == names


def test_the_command_removes_garbage(memory, small, tmp_path, capsys):
    assert killed_before(7, lambda: small(memory))
    names = memory.names()
    assert names
    for arguments in (["--dry-run"], []):
        with pytest.raises(SystemExit) as caught:
            main(["gc", str(memory), "--older-than", "0s", *arguments])
        assert caught.value.code == 0
        assert f"{len(names)} file" in capsys.readouterr().out
    assert memory.names() == set()
    with pytest.raises(SystemExit) as caught:
        main(["gc", str(tmp_path)])
    assert caught.value.code == 2


@pytest.mark.parametrize("age", ["5", "d7", "7d x", "", "7d12"])
def test_an_age_has_a_unit(memory, capsys, age):
    with pytest.raises(SystemExit) as exit:
        main(["gc", str(memory), "--older-than", age])
    assert exit.value.code == 2
    assert "write a number with a unit: s, m, h, d or w" in capsys.readouterr().err


def test_a_bucket_that_does_not_exist_is_an_error(s3):
    url = str(s3).replace("bucket", "none")
    with pytest.raises(StorageError, match="bucket does not exist"):
        collect_garbage(url, datetime.timedelta(days=7))
