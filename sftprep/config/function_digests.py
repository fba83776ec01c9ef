"""Stable digests of functions.

A stable digest is equal in every process in which the function does the same. The digest of a
function has the source of its file, and the values of the global variables that it uses: a script
may set these from its arguments. Code and values of other modules are not part of it. Functions
without a source of their own have no stable digest: lambdas and nested functions (which captured
values that nothing names), objects, and functions of notebooks and of stdin.
"""

from __future__ import annotations

import inspect
import pickle
import symtable
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any


def digest_of_function(function: Callable[..., Any]) -> str | None:
    """Return the stable digest of a function, in hex; None if it has none."""
    # A decorator may have captured values, as a nested function has.
    if (
        not isinstance(function, FunctionType)
        or "<" in function.__qualname__
        or hasattr(function, "__wrapped__")
    ):
        return None
    try:
        source = Path(inspect.getsourcefile(function) or "").read_bytes()
        table = symtable.symtable(source.decode(), "", "exec")
        names = _names_used(table, function.__qualname__.partition(".")[0])
        values = [(n, function.__globals__[n]) for n in sorted(names & function.__globals__.keys())]
        parts = [source, function.__qualname__, function.__defaults__, function.__kwdefaults__]
        parts += [(name, value) for name, value in values if not _is_code(value)]
        return sha256(b"".join(_stable_bytes(parts))).hexdigest()
    except Exception:  # its file cannot be read, or a value cannot be pickled
        return None


def digest_of_files(*files: str | None) -> str | None:
    """Return the hex digest of some files' contents; None if one is unreadable."""
    try:
        contents = [Path(file or "").read_bytes() for file in files]
    except OSError:
        return None
    return sha256(b"".join(_stable_bytes(contents))).hexdigest()


def _names_used(module: symtable.SymbolTable, name: str) -> set[str]:
    """Return the global names used by a definition, directly or indirectly."""
    definitions: dict[str, list[symtable.SymbolTable]] = {}
    for table in module.get_children():
        definitions.setdefault(table.get_name(), []).append(table)
    used: set[str] = set()
    waiting = {name}
    while waiting:
        used |= waiting
        tables = [table for each in waiting for table in definitions.get(each, ())]
        waiting = set().union(*map(_global_names, tables)) - used
    return used


def _global_names(table: symtable.SymbolTable) -> set[str]:
    names = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
    return names.union(*map(_global_names, table.get_children()))


def _is_code(value: object) -> bool:
    """Return whether a value is code with a name, in this file or in a module."""
    if isinstance(value, FunctionType) and "<" in value.__qualname__:
        raise TypeError("it may have captured values")
    return isinstance(value, (ModuleType, FunctionType, BuiltinFunctionType, type))


def _stable_bytes(value: Any) -> Iterator[bytes]:
    """Yield bytes of a value, independent of set order and of shared objects."""
    if isinstance(value, (list, tuple, dict)):
        yield f"{type(value).__name__} {len(value)} ".encode()
        for item in value.items() if isinstance(value, dict) else value:
            yield from _stable_bytes(item)
    elif isinstance(value, (set, frozenset)):
        items = sorted(b"".join(_stable_bytes(item)) for item in value)
        yield from _stable_bytes(items)
    else:
        content = pickle.dumps(value, protocol=4)
        yield b"%d " % len(content)
        yield content
