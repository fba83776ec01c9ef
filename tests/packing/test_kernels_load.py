"""The compiled kernels are loaded when needed, cached if possible, and use little memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sftprep

PACKAGE = Path(sftprep.__file__).parent
PLAN = """
import numpy as np
from sftprep.packing.bestfit import best_fit_decreasing
print(best_fit_decreasing(np.array([5, 3, 2, 7], np.int32), 8)[0].tolist())
"""


def run(code: str, root: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds the package under `root`."""
    inherited = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env={**inherited, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.fixture(scope="module")
def package_without_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package whose folder is not writable, as in a read-only installation."""
    root = tmp_path_factory.mktemp("read-only")
    (root / "sftprep").mkdir()
    for name in ("__init__.py", "errors.py", "message_text.py", "version.py"):
        shutil.copy(PACKAGE / name, root / "sftprep" / name)
    for name in ("core", "packing"):
        shutil.copytree(
            PACKAGE / name,
            root / "sftprep" / name,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    (root / "sftprep" / "packing" / "__pycache__").write_text(
        "a file where the folder would be: not even root can write there"
    )
    return root


def test_numba_is_imported_only_where_kernels_are_needed() -> None:
    code = (
        "import sys; from sftprep.packing import pack_lengths; many = [1] * 200_001\n"
        "pack_lengths(many, 4, 'none'); print('numba' in sys.modules)\n"
        "pack_lengths(many, 4); print('numba' in sys.modules)"
    )
    assert run(code, PACKAGE.parent).stdout.split() == ["False", "True"]


def test_read_only_package_caches_for_the_user_and_a_damaged_cache_is_survived(
    package_without_cache: Path, tmp_path: Path
) -> None:
    if sys.platform != "linux":
        pytest.skip("the user's cache folder is set by XDG_CACHE_HOME on Linux")
    cached = run(PLAN, package_without_cache, XDG_CACHE_HOME=str(tmp_path))
    assert cached.stdout == "[1, 1, 2, 0]\n"
    assert cached.stderr == ""
    files = sorted(tmp_path.rglob("*.nbc"))
    assert len(files) == 5
    for file in sorted(files, key=lambda file: file.stat().st_size)[:2]:  # these compile quickly
        file.write_bytes(file.read_bytes()[:500])
    damaged = run(PLAN, package_without_cache, XDG_CACHE_HOME=str(tmp_path))
    assert damaged.stdout == "[1, 1, 2, 0]\n"
    assert damaged.stderr.count("NUMBA_CACHE_DIR") == 1


def test_a_missing_cache_folder_is_reported_and_survived(package_without_cache: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("the user's cache folder is set by XDG_CACHE_HOME on Linux")
    plain = run(PLAN, package_without_cache, XDG_CACHE_HOME=os.devnull, HOME=os.devnull)
    assert plain.stdout == "[1, 1, 2, 0]\n"
    assert plain.stderr.count("NUMBA_CACHE_DIR") == 1


def test_memory_follows_the_sequences_not_the_capacity() -> None:
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    code = (
        "import resource; import numpy as np; from sftprep.packing.bestfit import"
        " best_fit_decreasing\nbest_fit_decreasing(np.array([1, 2], np.int32), 4)\nmapped ="
        " int(open('/proc/self/statm').read().split()[0]) *"
        " resource.getpagesize()\nresource.setrlimit(resource.RLIMIT_AS, (mapped + 64 * 2**20,"
        " resource.RLIM_INFINITY))\nlengths = np.array([2**31 - 1, 2**30, 7, 2**30 - 1],"
        " np.int32)\nprint(best_fit_decreasing(lengths, 2**31 - 1)[0].tolist())"
    )
    assert run(code, PACKAGE.parent).stdout == "[0, 1, 2, 1]\n"


def test_no_kernel_reaches_outside_its_arrays(tmp_path: Path) -> None:
    code = (
        "import numpy as np; import sftprep.packing.bestfit as b; rng = np.random.default_rng(0)\n"
        "plan = lambda lengths, capacity:"
        " b.best_fit_decreasing(np.asarray(lengths).astype(np.int32), capacity)\n"
        "for capacity in (1, 63, 64, 65, 4096, 2**18, 2**18 + 1, 2**31 - 1):\n"
        "    for shape in (0.3, 1, 3):\n"
        "        for n in (0, 1, 2, 50, 3000):\n"
        "            plan(capacity * rng.random(n) ** shape, capacity)\n"
        "            plan(capacity - np.arange(min(n, capacity)), capacity)\n"
        # few lengths, and a hundred segments that all move: their rows must be reused
        "plan([*range(1000, 1100), *[600] * 100, *[250] * 100, *[45] * 100, 1], 2000)\n"
        "try: b._count_keys(np.array([9], np.int32), 3)\n"
        "except IndexError: print('checked')"
    )
    assert (
        run(code, PACKAGE.parent, NUMBA_BOUNDSCHECK="1", NUMBA_CACHE_DIR=str(tmp_path)).stdout
        == "checked\n"
    )
