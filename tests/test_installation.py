"""What an installation needs: few packages, and no module that only Unix has."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from sftprep import verify
from sftprep.errors import MissingDependency
from sftprep.version import __version__
from sfttrain.cli.dependencies import PACKAGES, check_dependencies

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
UNIX_MODULES = ("fcntl", "resource")

# Python imports this module at its start, in worker processes too.
_HIDE_MODULES = """
import importlib.machinery as machinery, os

hidden = set(os.environ["HIDDEN_MODULES"].split())

def hide(finder):
    find = finder.find_spec
    finder.find_spec = lambda name, *rest: None if name in hidden else find(name, *rest)

hide(machinery.PathFinder)
hide(machinery.BuiltinImporter)
"""
_COMMANDS = """
import sys
import sftprep
from sftprep.cli.entry import main
from sftprep.stream import open_stream

rows, tokenizer, output = sys.argv[1:]
for command in (
    ["build", rows, "--tokenizer", tokenizer, "--output", output, "--workers", "2"],
    ["verify", output],
    ["inspect", output, "--row", "0"],
):
    try:
        main(command)
    except SystemExit as end:
        assert end.code == 0, command
pack = next(iter(open_stream(rows, tokenizer=tokenizer, max_length=64)))
assert pack.input_ids.tolist() == sftprep.open_shards(output)[0].input_ids.tolist()
assert not {"torch", "accelerate", "peft", "datasets"} & sys.modules.keys()
"""
_IMPORTS = """
import importlib, pkgutil, sftprep
for module in pkgutil.walk_packages(sftprep.__path__, "sftprep."):
    if module.name not in ("sftprep.torch", "sftprep.__main__"):
        importlib.import_module(module.name)
"""


@pytest.fixture
def run_without(tmp_path):
    """Return a function that runs Python code in a process without some modules."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_HIDE_MODULES)

    def run(hidden, code, *arguments):
        environment = {
            **os.environ,
            "HIDDEN_MODULES": " ".join(hidden),
            "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
            "SFTPREP_CACHE": str(tmp_path / "cache"),  # so that a tokenizer is loaded here
        }
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=300
        )

    return run


@pytest.mark.parametrize("hidden", [PACKAGES, (*PACKAGES, *UNIX_MODULES)], ids=["light", "windows"])
def test_building_and_streaming_need_no_torch(
    run_without, records, tokenizer_dir, tmp_path, hidden
):
    rows = records([{"text": "a b c"}, {"text": "d e"}])
    done = run_without(hidden, _COMMANDS, rows, tokenizer_dir, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert verify(tmp_path / "out").ok
    assert not (tmp_path / "out" / "spill").exists()


def test_all_modules_can_be_imported_without_modules_of_unix(run_without):
    done = run_without((*PACKAGES, *UNIX_MODULES), _IMPORTS)
    assert done.returncode == 0, done.stderr


def test_training_without_its_packages_names_the_pip_command(run_without):
    code = "import sys; from sfttrain.cli.main import main; sys.exit(main(sys.argv[1:]))"
    for hidden, *arguments in (
        (["torch"], "run", "D"),
        (["peft"], "run"),
        (PACKAGES, "run", "--help-all"),
        (PACKAGES, "chat", "D"),
        (PACKAGES, "env"),
    ):
        done = run_without(hidden, code, *arguments)
        assert done.returncode == 2
        message = f"error: sfttrain {arguments[0]} needs the package {hidden[0]}\n"
        assert done.stderr == message + '  → pip install "sftprep[train]"\n'
    assert run_without(PACKAGES, code, "run", "--help").returncode == 0


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("import sftprep.torch", "sftprep.torch needs the package torch"),
        ("from sfttrain import SFTTrainer", "sfttrain.SFTTrainer needs the package torch"),
        (
            "from sftprep.stream.hf_dataset import to_hf; to_hf(None)",
            "to_hf needs the package datasets",
        ),
    ],
)
def test_python_names_the_pip_command_too(run_without, code, what):
    done = run_without(PACKAGES, code)
    assert f"MissingDependency: {what}" in done.stderr
    assert "sftprep[train]" in done.stderr


def test_nothing_is_missing_here():
    check_dependencies("this")
    with pytest.raises(MissingDependency, match="numpy_2"):
        raise MissingDependency("numpy_2", needed_for="this")


# --- the metadata ---------------------------------------------------------------------------------

_PACKAGE_OF_MODULE = {"yaml": "pyyaml", "huggingface_hub": "huggingface-hub"}
_OPTIONAL = {"ray", "azure", "torch", "datasets"}
"""Packages of extras that sftprep imports where they are used."""


def names_of(requirements):
    return {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}


def imported_packages(package):
    """Return the packages that the modules of a package import, by their names on the index."""
    found = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.partition(".")[0])
    found -= {*sys.stdlib_module_names, "sftprep", "sfttrain"}
    return {_PACKAGE_OF_MODULE.get(name, name) for name in found}


def test_the_declared_packages_are_those_that_are_imported():
    base = names_of(PROJECT["dependencies"])
    train = names_of(PROJECT["optional-dependencies"]["train"])
    assert imported_packages("sftprep") - _OPTIONAL == base
    assert imported_packages("sfttrain") >= train == set(PACKAGES)
    assert imported_packages("sfttrain") - base - train <= {"liger_kernel", "bitsandbytes"}


def test_every_extra_names_packages_of_the_code():
    text = "".join(path.read_text() for path in ROOT.rglob("sf*/**/*.py"))
    for extra, requirements in PROJECT["optional-dependencies"].items():
        if extra.endswith("dev"):
            continue
        for package in names_of(requirements) - {"sftprep"}:
            assert re.search(rf"\b{package.replace('-', '[-_]')}\b", text), (extra, package)


def test_the_python_versions_are_those_that_ci_tests():
    classifiers = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    assert re.search(r"python: \[(.*)\]", workflow)[1] == ", ".join(f'"{v}"' for v in classifiers)
    assert PROJECT["requires-python"] == f">={classifiers[0]}"


def test_the_version_is_in_one_place():
    assert PROJECT["dynamic"] == ["version", "readme"]
    name = re.escape(__version__)
    sources = [*ROOT.glob("sf*/**/*.py"), ROOT / "pyproject.toml", ROOT / "README.md"]
    found = [path.name for path in sources if re.search(rf'["\']{name}["\']', path.read_text())]
    assert found == ["version.py"]
