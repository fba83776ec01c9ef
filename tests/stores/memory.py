"""A store in the memory of this process, for tests without a server.

Its conditional writes hold between the threads of the process.
"""

from __future__ import annotations

import threading
from typing import Any

from sftprep.stores.protocols import Protocol

_LOCK = threading.Lock()


def _create(system: Any, path: str, content: bytes) -> bool:
    with _LOCK:
        try:
            system.pipe_file(path, content, mode="create")
        except FileExistsError:
            return False
        return True


def _replace(system: Any, path: str, content: bytes, tag: str) -> bool:
    with _LOCK:
        if not system.exists(path) or str(system.info(path)["created"].timestamp()) != tag:
            return False
        system.pipe_file(path, content)
        return True


MEMORY = Protocol("fsspec", "", "created", _create, _replace)
