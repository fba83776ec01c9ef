"""Child processes for project modules, isolated from the working directory.

A file in the working directory that has the name of a module (`json.py`, `tokenizers.py`) may come
with a downloaded dataset, and must not be executed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])
"""Folder that contains this package."""


def module_command(module: str, *arguments: str) -> list[str]:
    """Return the command line for a module, with the current interpreter."""
    # With -m alone, Python searches the working directory first; -P prevents that.
    return [sys.executable, "-P", "-m", module, *arguments]


def module_environment() -> dict[str, str]:
    """Return the environment for `module_command`, with the path of this package.

    All descendants find this package.
    """
    # An empty entry of PYTHONPATH means the working directory, so empty entries are removed.
    paths = [PACKAGE_ROOT, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}


@contextmanager
def isolated_spawn() -> Iterator[None]:
    """Isolate `multiprocessing` children from the main script and working directory.

    A spawned process runs the main script of its parent from the top. Scripts without
    `if __name__ == "__main__"` are common, and would start the build again in each child; the
    passes need nothing from the script. A spawned process also starts with `python -c`, which
    searches the working directory first, and copies the search path of its parent, in which an
    empty entry (in an interactive session) means the working directory.
    """
    main, path, safe = sys.modules["__main__"], sys.path, os.environ.get("PYTHONSAFEPATH")
    sys.modules["__main__"] = ModuleType("__main__")  # a module without a file is not run again
    sys.path = [*dict.fromkeys([*filter(None, path), PACKAGE_ROOT])]
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        sys.modules["__main__"], sys.path = main, path
        if safe is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = safe
