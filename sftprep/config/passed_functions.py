"""Functions passed as objects, and received by worker processes by value.

So a lambda, and a function of a notebook or of stdin, work like any other, and no process runs the
script of the user a second time.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from typing import Any
from uuid import uuid4

from sftprep.config.function_digests import digest_of_function
from sftprep.config.user_modules import call_with_modules, is_user_module, user_module_files
from sftprep.errors import ConfigError, first_line, setting

_PROCESS = uuid4().hex
"""A part of the keys of functions without a stable digest, so that no other process has them."""


class PassedFunction(str):
    """A function passed as an object; as a string, it is the displayed name.

    So settings hold a string in any case: the name of a function to load, or this.

    Attributes:
        digest: The stable digest of the function; None if it has none.
        key: Differs between functions that do not do the same; known to this process only.
    """

    digest: str | None
    key: str
    _function: Callable[..., Any] | None  # None in other processes, until it is loaded
    _payload: bytes | None  # the pickled function; None if it cannot be pickled
    _problem: str  # why it cannot be pickled
    _files: dict[str, str]  # the files of the user's modules that it may import

    @classmethod
    def of(cls, function: Callable[..., Any]) -> PassedFunction:
        """Return the setting for a function.

        Workers receive the state of the function at this time.
        """
        self = cls(_name_of(function))
        self._function, self._files, self._problem = function, user_module_files(), ""
        try:
            self._payload = _pickle_by_value(function)
            self.key = f"{_PROCESS}:{sha256(self._payload).hexdigest()}"
        except Exception as error:  # classes of users raise anything
            self._payload, self.key = None, f"{_PROCESS}:{uuid4().hex}"
            self._problem = f"{type(error).__name__}: {first_line(error, 300)}"
        self.digest = digest_of_function(function)
        return self

    def load(self) -> Callable[..., Any]:
        """Return the function.

        Raises:
            ConfigError: This is another process, and a module that the function needs is missing.
        """
        if self._function is None:
            try:
                self._function = call_with_modules(
                    partial(pickle.loads, self._payload or b""), self._files
                )
            except Exception as error:
                raise ConfigError(
                    f"the function {self} cannot be loaded in a worker process:"
                    f" {type(error).__name__}: {first_line(error, 300)}",
                    remedy=f"use {setting('workers', 1)}",
                ) from error
        return self._function

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PassedFunction) and self.key == other.key

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.key)

    def __deepcopy__(self, _memo: object) -> PassedFunction:
        return self  # it never changes, and `dataclasses.asdict` copies its values

    def __reduce__(self) -> tuple[Any, ...]:
        if self._payload is None:
            raise ConfigError(
                f"the function {self} cannot be passed to another process: {self._problem}",
                remedy=[
                    f"use {setting('workers', 1)}",
                    "create what it uses inside the function",
                ],
            )
        return _restore, (str.__str__(self), self.digest, self.key, self._payload, self._files)


def _restore(
    name: str, digest: str | None, key: str, payload: bytes, files: dict[str, str]
) -> PassedFunction:
    self = PassedFunction(name)
    self.digest, self.key, self._problem = digest, key, ""
    self._function, self._payload, self._files = None, payload, files
    return self


def _name_of(function: Callable[..., Any]) -> str:
    """Return the module and name of a function, or of an object's class."""
    named: Any = function if hasattr(function, "__qualname__") else type(function)
    return f"{getattr(named, '__module__', None) or 'builtins'}:{named.__qualname__}"


def _pickle_by_value(function: Callable[..., Any]) -> bytes:
    """Return the pickle of a function.

    It contains what the function uses of its own module, with the present values of variables, if
    that is a module of the user. What it imports is imported by the process that loads it.
    """
    import cloudpickle

    module = sys.modules.get(getattr(function, "__module__", None) or "")
    if (
        module is None
        or not is_user_module(module)
        or module.__name__ in ("__main__", *cloudpickle.list_registry_pickle_by_value())
    ):
        return bytes(cloudpickle.dumps(function))
    cloudpickle.register_pickle_by_value(module)
    try:
        return bytes(cloudpickle.dumps(function))
    except Exception:
        pass  # something in the module cannot be pickled: the process imports the module
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    return bytes(cloudpickle.dumps(function))
