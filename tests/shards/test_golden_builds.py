"""Builds of earlier versions of the format are read as they were written."""

from __future__ import annotations

import json
from dataclasses import fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from sftprep import open_shards, verify
from sftprep.shards.reader import Shards

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


def test_every_golden_build_has_expectations() -> None:
    found = {
        str(path.parent.relative_to(GOLDEN).as_posix()) for path in GOLDEN.rglob("manifest.json")
    }
    assert found == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_golden_build_is_read_as_it_was_written(name: str) -> None:
    assert describe(open_shards(GOLDEN / name)) == EXPECTED[name]
    assert verify(GOLDEN / name).ok
