"""A corpus that several tests stream: more than a thousand short records in a plain file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.stream.plain_packs import rows


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of 800 text records."""
    path = Path(tmp_path_factory.mktemp("corpus")) / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows("text", 800)), encoding="utf-8")
    return str(path)
