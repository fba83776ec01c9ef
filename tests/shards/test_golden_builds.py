"""Builds of earlier versions of the format are read as they were written."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from sftprep import open_shards, read_manifest, verify
from sftprep.report.source_summary import source_ledgers
from sftprep.shards.length_advice import advise_length
from sftprep.shards.reading.shards import Shards

GOLDEN = Path(__file__).parent.parent / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))


def describe(shards: Shards) -> dict[str, Any]:
    """Return the content of a build: a digest of all arrays of each pack, and their origins."""
    packs = []
    for pack in shards:
        state = sha256()
        for field in fields(pack):
            values = getattr(pack, field.name)
            if values is not None and field.name != "origin":
                state.update(f"{field.name} {values.dtype} {values.shape}".encode())
                state.update(values.tobytes())
        origins = [list(shards.manifest.locate(origin)) for origin in pack.origin.tolist()]
        packs.append({"digest": state.hexdigest()[:16], "origins": origins})
    manifest = shards.manifest
    return {
        "version": manifest.format_version,
        "tokens": manifest.tokens,
        "trained_tokens": manifest.trained_tokens,
        "packs": packs,
    }


def test_what_an_older_version_lacks_is_empty() -> None:
    (name,) = (name for name, content in EXPECTED.items() if content["version"] == "1.0")
    manifest = read_manifest(GOLDEN / name)
    assert (manifest.eval, manifest.lengths, manifest.sources) == ({}, {}, ())
    assert advise_length(manifest) is None
    assert [name for name, _ in source_ledgers(manifest)] == [i.path for i in manifest.inputs]


def test_a_later_minor_version_is_read(tmp_path: Path) -> None:
    name = next(name for name, content in EXPECTED.items() if content["version"] == "1.1")
    folder = tmp_path / "b"
    shutil.copytree(GOLDEN / name, folder)
    values = json.loads((folder / "manifest.json").read_bytes())
    later = values | {"format_version": "1.7", "a_later_field": 1}
    (folder / "manifest.json").write_text(json.dumps(later))
    assert len(open_shards(folder)) == values["rows"]


def test_every_golden_build_has_expectations() -> None:
    found = {
        str(path.parent.relative_to(GOLDEN).as_posix()) for path in GOLDEN.rglob("manifest.json")
    }
    assert found == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_golden_build_is_read_as_it_was_written(name: str) -> None:
    assert describe(open_shards(GOLDEN / name)) == EXPECTED[name]
    assert verify(GOLDEN / name).ok
