"""Builds with more shards than the kernel maps in one process."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sftprep.errors import ShardError
from sftprep.shards.layout import GROUP_FOLDER, SHARD_FOLDER
from sftprep.shards.manifest import read_manifest
from sftprep.shards.reading.open_build import open_shards
from sftprep.shards.reading.shards import Shards
from tests.shards.builds import rewritten, write_build


def write_many(root: Path, num_shards: int) -> list[Path]:
    """Write a build of many shards with the same content, and return their files."""
    write_build(root, [[3, 2]], shard_rows=1)
    folder = root / SHARD_FOLDER
    files = [folder / read_manifest(root).shards[0].name]
    content = files[0].read_bytes()
    for number in range(1, num_shards):
        files.append(files[0].with_name(files[0].name.replace("00000", f"{number:05d}", 1)))
        files[-1].write_bytes(content)

    def repeat(values: dict[str, Any]) -> None:
        names = [path.relative_to(folder).as_posix() for path in files]
        values["shards"] = [{**values["shards"][0], "name": name} for name in names]
        values["groups"][0]["packs"] *= num_shards
        for name in ("rows", "tokens", "trained_tokens"):
            values[name] *= num_shards

    rewritten(root, repeat)
    return files


def count_maps(folder: Path) -> int:
    return Path("/proc/self/maps").read_text(encoding="utf-8").count(str(folder))


def read_all(shards: Shards) -> None:
    expected = shards[0].input_ids.tolist()
    for index in range(len(shards)):
        assert shards[index].input_ids.tolist() == expected


def test_only_the_shards_used_last_stay_mapped(tmp_path: Path) -> None:
    files = write_many(tmp_path / "b", 700)
    shards = open_shards(tmp_path / "b")
    kept = shards[5]
    for _ in range(2):
        read_all(shards)
        assert count_maps(tmp_path / "b") <= 260
    assert kept.input_ids.tolist() == shards[5].input_ids.tolist()
    # A file that was replaced since its shard was mapped is checked again.
    changed = bytearray(files[0].read_bytes())
    changed[changed.index(kept.input_ids.tobytes())] ^= 1
    files[0].write_bytes(changed)
    with pytest.raises(ShardError, match="damaged"):
        _ = shards[0]


@pytest.mark.slow
def test_more_shards_than_the_kernel_maps(tmp_path: Path) -> None:
    write_many(tmp_path / "b", 70_000)
    read_all(open_shards(tmp_path / "b"))


OPEN = """
import sys
from pathlib import Path
from sftprep import open_shards

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) << 12

before = resident()
shards = open_shards(sys.argv[1])
print(len(shards), resident() - before)
"""


@pytest.mark.slow
def test_a_million_shards_are_opened_by_their_root_alone(tmp_path: Path) -> None:
    """The files of the 4,000 groups do not even exist."""
    write_build(tmp_path / "b", [[3, 2]])

    def grow(values: dict[str, Any]) -> None:
        entry = {**values["groups"][0], "packs": [4096] * 250}
        values["groups"] = [{**entry, "key": f"{number:016x}"} for number in range(4000)]
        values["rows"] = 4000 * 250 * 4096

    rewritten(tmp_path / "b", grow)
    shutil.rmtree(tmp_path / "b" / GROUP_FOLDER)
    command = [sys.executable, "-c", OPEN, str(tmp_path / "b")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    packs, num_bytes = map(int, done.stdout.split())
    assert packs == 4_096_000_000
    assert num_bytes < 40 << 20
