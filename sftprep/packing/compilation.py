"""Compilation of kernels with numba, with a fail-safe cache.

A failure of the cache never stops a build. Importing this module imports numba, which takes half a
second.
"""

from __future__ import annotations

import functools
import os
import pickle
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

# numba reads `.numba_config.yaml` in the working directory, and two of its settings name code: the
# folder of cached machine code, and the classes that find it. Environment variables override that
# file; empty ones select the defaults of numba.
for _name in ("NUMBA_CACHE_DIR", "NUMBA_CACHE_LOCATOR_CLASSES"):
    os.environ.setdefault(_name, "")

import numba  # noqa: E402

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(*arguments: Any) -> Callable[[_Function], _Function]:
    """Compile a function at its definition, for exactly these argument types.

    The machine code is cached in numba's cache: in the folder of the function's file, or in the
    cache folder of the user if the package is read-only. numba raises if neither can be written,
    the disk is full or a cached file is damaged. Compiling takes two seconds, so the function is
    then compiled without a cache.
    """

    def decorate(function: _Function) -> _Function:
        try:
            return cast(_Function, numba.njit(arguments, nogil=True, cache=True)(function))
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            _warn_uncached(type(error).__name__)
            return cast(_Function, numba.njit(arguments, nogil=True)(function))

    return decorate


def inlined(function: _Function) -> _Function:
    """Compile a function for inlining into the kernels of its callers."""
    return cast(_Function, numba.njit(nogil=True)(function))


@functools.cache  # one warning per process, not one per kernel
def _warn_uncached(reason: str) -> None:
    warnings.warn(
        "the packing kernels are compiled again in each process, since numba's cache cannot be used"
        f" ({reason}); set NUMBA_CACHE_DIR to an empty, writable folder",
        RuntimeWarning,
        stacklevel=3,
    )
