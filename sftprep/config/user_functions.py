"""Functions of users, addressed by name so that worker processes can load them.

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
    "write package.module:function or path/to/file.py:function; the function must be at the top"
    " level of its module"
)


def name_of(function: UserFunction) -> str:
    """Return the name under which `load_function` finds a function again.

    Raises:
        ConfigError: The function has no such name; an example is a lambda.
    """
    qualified = getattr(function, "__qualname__", "")
    module = getattr(function, "__module__", None) or ""
    if not qualified or not module or "<" in qualified:
        raise ConfigError(
            f"{function!r} has no name by which a worker process could find it", remedy=_REMEDY
        )
    if module == "__main__":
        # A worker has another main module, so the function is addressed by its file.
        file = getattr(sys.modules["__main__"], "__file__", None)
        if file is None:
            raise ConfigError(
                f"the function {qualified} is not in a file, so no worker process could find it",
                remedy=_REMEDY,
            )
        return f"{Path(file).resolve()}:{qualified}"
    return f"{module}:{qualified}"


@cache
def load_function(name: str) -> UserFunction:
    """Return the function with the given name.

    A module that is not installed is loaded from the working directory. Its own imports are not
    searched for there, except for other modules of the same package.

    Raises:
        ConfigError: The function does not exist, or importing its module raises.
    """
    location, colon, qualified = name.rpartition(":")
    if not (colon and location and qualified):
        raise ConfigError(f"{name!r} does not name a function", remedy=_REMEDY)
    found: Any = _load_module(location, name)
    for part in qualified.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ConfigError(f"there is no function {qualified} in {location}", remedy=_REMEDY)
    function: UserFunction = found
    return function


def source_digest(name: str) -> str:
    """Return the SHA-256, in hex, of the source of a function's module.

    It is a part of the recipe, since a changed function may return other texts.

    Raises:
        ConfigError: The function does not exist, or its source cannot be read.
    """
    function = load_function(name)
    try:
        text = Path(inspect.getsourcefile(inspect.unwrap(function)) or "").read_bytes()
    except (OSError, TypeError) as error:
        raise ConfigError(
            f"the source of {name} cannot be read: {error}", remedy=_REMEDY
        ) from error
    return sha256(text).hexdigest()


def _load_module(location: str, name: str) -> ModuleType:
    try:
        if location.endswith(".py"):
            return _module_of_file(Path(location).resolve())
        _import_from_working_directory(location.partition(".")[0])
        return importlib.import_module(location)
    except (Exception, SystemExit) as error:
        # Importing runs user code, which may raise any exception, or may be a script that exits.
        remedy = _REMEDY
        if isinstance(error, ModuleNotFoundError):
            remedy += (
                "; its module can import installed packages and other modules of its own package"
            )
        raise ConfigError(
            f"cannot load {name}: {type(error).__name__}: {error}", remedy=remedy
        ) from error


def _import_from_working_directory(package: str) -> None:
    """Import a module or package of the working directory, unless it is installed.

    The working directory is not added to the search path: it may contain downloaded files with the
    names of installed modules, which must not be imported.
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
        del sys.modules[name]  # the next import must not find the incomplete module
        raise
    return module
