"""User functions by name, for worker processes and digests.

A name is `package.module:function` or `path/to/file.py:function`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from sftprep.errors import ConfigError

UserFunction = Callable[..., Any]

_REMEDY = (
    "write package.module:function or path/to/file.py:function, of a function at the top level of "
    "its module"
)


def name_of(function: UserFunction) -> str:
    """Return the name under which `load_function` finds a function again.

    Raises:
        ConfigError: the function has no such name, as a lambda.
    """
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
                f"the function {qualified} is in no file, so no worker process could find it",
                remedy=_REMEDY,
            )
        return f"{Path(file).resolve()}:{qualified}"
    return f"{module}:{qualified}"


@cache
def load_function(name: str) -> UserFunction:
    """Load the function of that name.

    A module that is not installed is searched for in the working directory; nothing that it
    imports is, except the other modules of its own package.

    Raises:
        ConfigError: there is no such function, or its module raises.
    """
    place, colon, qualified = name.rpartition(":")
    if not (colon and place and qualified):
        raise ConfigError(f"{name!r} does not name a function", remedy=_REMEDY)
    found: Any = _load_module(place, name)
    for part in qualified.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ConfigError(f"there is no function {qualified} in {place}", remedy=_REMEDY)
    function: UserFunction = found
    return function


def source_digest(name: str) -> str:
    """Return the SHA-256, in hex, of the module of a function: another source may give other text.

    Raises:
        ConfigError: there is no such function, or its source cannot be read.
    """
    function = load_function(name)
    try:
        text = Path(inspect.getsourcefile(inspect.unwrap(function)) or "").read_bytes()
    except (OSError, TypeError) as error:
        raise ConfigError(
            f"the source of {name} cannot be read: {error}", remedy=_REMEDY
        ) from error
    return sha256(text).hexdigest()


def _load_module(place: str, name: str) -> ModuleType:
    try:
        if place.endswith(".py"):
            return _module_of_file(Path(place).resolve())
        _import_from_working_directory(place.partition(".")[0])
        return importlib.import_module(place)
    except (Exception, SystemExit) as error:
        # Importing runs code of the user, which may raise anything, and may be a script that exits.
        remedy = _REMEDY
        if isinstance(error, ModuleNotFoundError):
            remedy += (
                "; its module may import what is installed, and other modules of its own package"
            )
        raise ConfigError(
            f"cannot load {name}: {type(error).__name__}: {error}", remedy=remedy
        ) from error


def _import_from_working_directory(package: str) -> None:
    """Import a module or package of the working directory, unless one of that name is installed.

    The working directory does not become a part of the search path: what else is in there must not
    be imported by its name.
    """
    if package in sys.modules or importlib.util.find_spec(package) is not None:
        return
    spec = PathFinder.find_spec(package, [os.getcwd()])
    if spec is not None:
        _execute(package, spec)


def _module_of_file(path: Path) -> ModuleType:
    name = f"sftprep_user_{sha256(str(path).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    return _execute(name, spec)


def _execute(name: str, spec: importlib.machinery.ModuleSpec) -> ModuleType:
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        assert spec.loader is not None
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]  # a module that raised must not be found half-made the next time
        raise
    return module
