"""What several tests share: the folder of real data that some of them use, and where it is absent,
the reason to skip."""

from __future__ import annotations

from pathlib import Path

import pytest

_CANDIDATE = Path(__file__).resolve().parents[1].parent / "shared" / "data"
SHARED: Path = _CANDIDATE
"""Folder of real tokenizers, datasets and a tiny model, beside the checkout."""

needs_shared = pytest.mark.skipif(
    not _CANDIDATE.is_dir(), reason="the real data is not beside this checkout (../shared/data)"
)
