"""Functions of users as settings: by name, or as objects.

A name is `package.module:function` or `path/to/file.py:function`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from types import ModuleType
from typing import Any

from sftprep.config.function_digests import digest_of_files
from sftprep.config.passed_functions import PassedFunction
from sftprep.config.user_modules import import_module
from sftprep.config.validation import expand_path
from sftprep.errors import ConfigError

UserFunction = Callable[..., Any]

_REMEDY = (
    "write package.module:function or path/to/file.py:function; the function must be at the top"
    " level of its module"
)


def to_function_setting(function: Any, label: str) -> str | None:
    """Return the setting for a function: its name, or a PassedFunction for an object.

    Args:
        function: The name, the function itself, or None.
        label: The setting, for errors.

    Raises:
        ConfigError: It is anything else.
    """
    if function is None or isinstance(function, PassedFunction):
        return function
    if isinstance(function, str):
        return expand_path(function, label)
    if not callable(function):
        raise ConfigError(f"{label} is {function!r}", remedy=_REMEDY)
    return PassedFunction.of(function)


def load_function(function: str) -> UserFunction:
    """Return the function of a setting.

    Raises:
        ConfigError: The function does not exist, or importing its module raises.
    """
    return function.load() if isinstance(function, PassedFunction) else _load_named(function)[0]


def function_digest(function: str) -> str | None:
    """Return the stable digest of the function of a setting, in hex; None if it has none.

    That of a function by name is the digest of its file.

    Raises:
        ConfigError: The function does not exist, or importing its module raises.
    """
    return function.digest if isinstance(function, PassedFunction) else _load_named(function)[1]


def function_key(function: str | None, version: str | None) -> str | None:
    """Return a key for what is derived from a function; None if that must not be stored.

    Args:
        function: The setting, or None.
        version: The `transform_id` of the user, which names this state of the function.
    """
    stable = None if function is None else function_digest(function)
    known = [part for part in (stable, version) if part is not None]
    return "" if function is None else " ".join(known) or None


def _load_named(name: str) -> tuple[UserFunction, str | None]:
    """Return the function of a name, and its stable digest."""
    location, colon, qualified = name.rpartition(":")
    if not (colon and location and qualified):
        raise ConfigError(f"{name!r} does not name a function", remedy=_REMEDY)
    # A file that changed since it was loaded is loaded again.
    state = digest_of_files(location) if location.endswith(".py") else None
    return _load_from(location, qualified, state)


@cache
def _load_from(
    location: str, qualified: str, _state: str | None
) -> tuple[UserFunction, str | None]:
    module = _import(location, qualified)
    found: Any = module
    for part in qualified.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ConfigError(f"there is no function {qualified} in {location}", remedy=_REMEDY)
    files = [getattr(module, "__file__", None)]
    with suppress(TypeError):  # an object, or a function without a source
        files.append(inspect.getsourcefile(inspect.unwrap(found)))  # it may be in another file
    return found, digest_of_files(*files)


def _import(location: str, qualified: str) -> ModuleType:
    try:
        return import_module(location)
    except (Exception, SystemExit) as error:
        # Importing runs user code, which may raise any exception, or may be a script that exits.
        remedy = _REMEDY
        if isinstance(error, ModuleNotFoundError):
            remedy += (
                "; its module can import installed packages and other modules of its own package"
            )
        raise ConfigError(
            f"cannot load {location}:{qualified}: {type(error).__name__}: {error}", remedy=remedy
        ) from error
