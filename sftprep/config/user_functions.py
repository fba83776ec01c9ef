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
from uuid import uuid4

from sftprep.config.function_digests import digest_of_files
from sftprep.config.passed_functions import PassedFunction
from sftprep.config.user_modules import import_module
from sftprep.config.validation import expand_path
from sftprep.errors import ConfigError, InputChanged

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


class NamedFunction(str):
    """A function loaded by its name in each process.

    Attributes:
        digest: The stable digest of the function, that of its file; None if it has no file.
        key: Differs between functions that do not do the same; known to this process only.
    """

    digest: str | None
    key: str
    _function: UserFunction | None  # None in other processes, until it is loaded

    @classmethod
    def of(cls, name: str) -> NamedFunction:
        """Load a function.

        Raises:
            ConfigError: The function does not exist, or importing its module raises.
        """
        self = cls(name)
        self._function, self.digest = _load_named(name)
        self.key = uuid4().hex
        return self

    def load(self) -> UserFunction:
        """Return the function.

        Raises:
            ConfigError: This is another process, where it cannot be loaded.
            InputChanged: This is another process, and the file has changed in the meantime.
        """
        if self._function is None:
            self._function, digest = _load_named(str.__str__(self))
            if digest != self.digest:
                raise InputChanged(
                    f"the file of the function {self} changed while it was in use",
                    remedy="run the command again",
                )
        return self._function

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (str.__str__(self), self.digest, self.key)


LoadedFunction = NamedFunction | PassedFunction
"""A function that is ready for use: `load` returns it, here and in other processes."""


def resolve_function(function: str | None) -> LoadedFunction | None:
    """Return the function of a setting, as it is now; None if there is none.

    Raises:
        ConfigError: The function does not exist, or importing its module raises.
    """
    if function is None or isinstance(function, (NamedFunction, PassedFunction)):
        return function
    return NamedFunction.of(function)


def _restore(name: str, digest: str | None, key: str) -> NamedFunction:
    self = NamedFunction(name)
    self._function, self.digest, self.key = None, digest, key
    return self


def function_key(function: str | None, version: str | None) -> str | None:
    """Return a key for results of a function; None if they must not be stored.

    Args:
        function: The setting, or None.
        version: The `transform_id` of the user, which names this state of the function.
    """
    resolved = resolve_function(function)
    if resolved is None:
        return ""
    return " ".join(part for part in (resolved.digest, version) if part is not None) or None


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
        raise ConfigError(f"{location} has no function {qualified}", remedy=_REMEDY)
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
