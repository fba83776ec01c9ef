"""Functions of the user by name: `package.module:function` or `file.py:function`, so that workers
and digests can have them."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from sftprep.errors import ConfigError

UserFunction = Callable[..., Any]

_REMEDY = (
    "write package.module:function or path/to/file.py:function, of a function that stands at the"
    " top of its module"
)


def name_of(function: UserFunction) -> str:
    """The name under which `load_function` finds a function again. Raises ConfigError for one that
    has none, as a lambda."""
    qualified = getattr(function, "__qualname__", "")
    module = getattr(function, "__module__", None) or ""
    if not qualified or not module or "<" in qualified:
        raise ConfigError(
            f"{function!r} has no name by which a worker process could find it", remedy=_REMEDY
        )
    if module == "__main__":
        file = getattr(sys.modules["__main__"], "__file__", None)
        if file is None:
            raise ConfigError(
                f"the function {qualified} stands in no file, so no worker process could find it",
                remedy=_REMEDY,
            )
        return f"{Path(file).resolve()}:{qualified}"
    return f"{module}:{qualified}"


@cache
def load_function(name: str) -> UserFunction:
    """The function of that name; modules are looked for in the working directory too. Raises
    ConfigError."""
    place, colon, qualified = name.rpartition(":")
    if not (colon and place and qualified):
        raise ConfigError(f"{name!r} names no function", remedy=_REMEDY)
    found: Any = _module(place, name)
    for part in qualified.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ConfigError(f"there is no function {qualified} in {place}", remedy=_REMEDY)
    function: UserFunction = found
    return function


def source_digest(name: str) -> str:
    """SHA-256, in hex, of the module that a function stands in: another source may give another
    text. Raises ConfigError."""
    function = load_function(name)
    try:
        text = Path(inspect.getsourcefile(inspect.unwrap(function)) or "").read_bytes()
    except (OSError, TypeError) as error:
        raise ConfigError(
            f"the source of {name} cannot be read: {error}", remedy=_REMEDY
        ) from error
    return sha256(text).hexdigest()


def _module(place: str, name: str) -> ModuleType:
    try:
        if place.endswith(".py"):
            return _of_file(Path(place).resolve())
        if os.getcwd() not in sys.path:
            # Commands are started from a folder of their own; what the user means stands where the
            # user is.
            sys.path.append(os.getcwd())
        return importlib.import_module(place)
    except Exception as error:
        # Importing runs code of the user, which may raise anything.
        raise ConfigError(
            f"cannot load {name}: {type(error).__name__}: {error}", remedy=_REMEDY
        ) from error


def _of_file(path: Path) -> ModuleType:
    module_name = f"sftprep_user_{sha256(str(path).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    return module
