"""Modules of users: files, and modules possibly in the working directory.

Nothing but the named module is executed, and the search path stays as it is: the working directory
may contain downloaded files with the names of installed modules, which must not be imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Callable, Mapping
from functools import partial
from hashlib import sha256
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import TypeVar

_Result = TypeVar("_Result")


def import_module(location: str) -> ModuleType:
    """Import `package.module` or `path/to/file.py`.

    Any exception of its code is raised. A module that is not installed is loaded from the working
    directory. Its own imports are not searched for there, except for other modules of the same
    package.
    """
    if location.endswith(".py"):
        path = Path(location).resolve()
        return _import_file(f"sftprep_user_{sha256(str(path).encode()).hexdigest()[:16]}", path)
    package = location.partition(".")[0]
    if package not in sys.modules and importlib.util.find_spec(package) is None:
        spec = PathFinder.find_spec(package, [os.getcwd()])
        if spec is not None:
            _execute(package, spec)
    return importlib.import_module(location)


def is_user_module(module: ModuleType) -> bool:
    """Return whether a module is a user's file.

    Such a file is neither installed nor part of the standard library.
    """
    path = Path(getattr(module, "__file__", None) or "")
    return (
        path.suffix == ".py"
        and not {"site-packages", "dist-packages"} & set(path.parts)
        and not path.is_relative_to(sysconfig.get_path("stdlib"))
    )


def user_module_files() -> dict[str, str]:
    """Return the files of imported top-level user modules, by name."""
    return {
        name: str(module.__file__)
        for name, module in list(sys.modules.items())
        if "." not in name and name != "__main__" and is_user_module(module)
    }


def call_with_modules(call: Callable[[], _Result], files: Mapping[str, str]) -> _Result:
    """Call a function, importing any missing modules, and return its result.

    Args:
        call: The function, which is called again after each import.
        files: The file of each module that may be imported, by its name.
    """
    while True:
        try:
            return call()
        except ModuleNotFoundError as missing:
            name = missing.name or ""
            if name not in files or name in sys.modules:
                raise
            call_with_modules(partial(_import_file, name, Path(files[name])), files)


class _SourceLoader(SourceFileLoader):
    """A loader for source files without cached bytecode.

    A cached bytecode file is valid for every source of the same size and the same second, so that
    the function executed could differ from the one whose digest is recorded.
    """

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        code: CodeType = self.source_to_code(self.get_data(path), path)
        return code


def _import_file(name: str, path: Path) -> ModuleType:
    folders = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(
        name, path, loader=_SourceLoader(name, str(path)), submodule_search_locations=folders
    )
    if spec is None:
        raise ImportError(f"{path} is not a Python file")
    return _execute(name, spec)


def _execute(name: str, spec: ModuleSpec) -> ModuleType:
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        assert spec.loader is not None
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]  # the next import must not find the incomplete module
        raise
    return module
