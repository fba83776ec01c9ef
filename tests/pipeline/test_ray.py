"""A build on a cluster of Ray has the bytes of a local one, also if a worker or machine dies."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import EXAMPLES

ROOT = Path(__file__).parent.parent.parent
# A network of its own, in which Ray finds only the loopback device.
_NAMESPACE = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]


def _has_namespaces() -> bool:
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return False
    return subprocess.run([*_NAMESPACE, "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.ray
def test_a_cluster_makes_the_same_bytes(tokenizer_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    if not _has_namespaces():
        pytest.skip("needs a network namespace (unshare -rn) and ip")
    text = (EXAMPLES / "data" / "chats.jsonl").read_text(encoding="utf-8")
    source = tmp_path / "data"
    source.mkdir()
    for number in range(12):
        rows = [json.loads(line) for line in text.splitlines()]
        for row in rows:
            # Two files have the same records, which are duplicates.
            row["messages"][0]["content"] += f" ({number // 2})"
        lines = map(json.dumps, rows)
        (source / f"{number:02d}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    command = [*_NAMESPACE, sys.executable, "-m", "tests.pipeline.ray_cluster"]
    done = subprocess.run(
        [*command, str(tmp_path / "builds"), str(source), str(tokenizer_dir)],
        cwd=ROOT,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    found = re.findall(r"^(.*?):? ([0-9a-f]{64})$", done.stdout, re.MULTILINE)
    has_store = all(map(importlib.util.find_spec, ("s3fs", "moto")))
    assert len(found) == (10 if has_store else 8), done.stdout
    mixtures = {digest for name, digest in found if name.startswith("mixture")}
    others = {digest for name, digest in found if not name.startswith("mixture")}
    assert (len(mixtures), len(others)) == (1, 1), found
