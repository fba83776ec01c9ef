"""No code in the working directory is executed, except a function that the user names."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from sftprep import build
from sftprep.config import user_functions
from sftprep.config.user_functions import resolve_function
from sftprep.errors import ConfigError
from tests.conftest import EXAMPLES
from tests.sfttrain.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = EXAMPLES / "data" / "qa.jsonl"

PLANTED = """
import os
open(os.path.join({marks!r}, {name!r}), "a").write(str(os.getpid()))
raise ImportError("a file in the working directory was executed")
"""


def hostile_folder(folder: Path, marks: Path) -> Path:
    """Fill a folder with modules of every name that our processes could import."""
    marks.mkdir()
    names = {*sys.stdlib_module_names, *packages_distributions(), "sitecustomize", "usercustomize"}
    for name in names - {"sftprep", "sfttrain", "tests"}:
        if name.isidentifier():
            (folder / f"{name}.py").write_text(PLANTED.format(marks=str(marks), name=name))
    return folder


def remove_modules_of_python(folder: Path, tmp_path: Path) -> None:
    """Remove the modules that `python -m` imports before it runs anything of ours."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "nothing.py").write_text("import sys; print(*sys.modules)")
    loaded = run_in(tmp_path / "empty", sys.executable, "-m", "nothing").stdout.split()
    for name in loaded:
        (folder / f"{name}.py").unlink(missing_ok=True)


def run_in(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", ""), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def script(name: str) -> str:
    """Return the path of an installed command, as a shell finds it."""
    return str(Path(sys.executable).parent / name)


def test_a_build_executes_nothing_from_the_working_directory(tokenizer_dir, tmp_path):
    folder, marks = tmp_path / "downloaded", tmp_path / "marks"
    folder.mkdir()
    (folder / "data.jsonl").write_bytes(QUESTIONS.read_bytes())
    for file in tokenizer_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    hostile_folder(folder, marks)
    arguments = ("build", "data.jsonl", "--tokenizer", ".", "--workers", "3", "--output")
    cache = {"SFTPREP_CACHE": str(tmp_path / "cache")}
    done = run_in(folder, script("sftprep"), *arguments, str(tmp_path / "out"), **cache)
    assert (done.returncode, os.listdir(marks)) == (0, []), done.stderr
    done = run_in(folder, script("sftprep"), "inspect", str(tmp_path / "out"), **cache)
    assert (done.returncode, os.listdir(marks)) == (0, []), done.stderr
    remove_modules_of_python(folder, tmp_path)
    command = (sys.executable, "-m", "sftprep", *arguments, str(tmp_path / "again"))
    done = run_in(folder, *command, PYTHONPATH=str(ROOT), **cache)
    assert (done.returncode, os.listdir(marks)) == (0, []), done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ("-m", "sftprep.cli"),
        ("-m", "sftprep.tokenize.loading.load", "build", "x.jsonl"),
        ("-B", "-msftprep.api"),
        ("-m", "sfttrain.cli.main", "run"),
        ("-Bm", "sfttrain.cli", "run", "-m"),
        ("-Bmsfttrain.cli.main", "--version"),
    ],
    ids=" ".join,
)
def test_a_submodule_as_a_command_executes_nothing_from_the_working_directory(command, tmp_path):
    folder, marks = tmp_path / "downloaded", tmp_path / "marks"
    folder.mkdir()
    hostile_folder(folder, marks)
    remove_modules_of_python(folder, tmp_path)
    done = run_in(folder, sys.executable, *command, PYTHONPATH=str(ROOT))
    assert os.listdir(marks) == [], done.stderr


@pytest.mark.slow
def test_a_training_run_executes_nothing_from_the_working_directory(tokenizer_dir, tmp_path):
    folder, marks, model = tmp_path / "downloaded", tmp_path / "marks", tmp_path / "model"
    tiny_model("llama", vocab_size=700, max_position_embeddings=1024).save_pretrained(model)
    for file in tokenizer_dir.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    folder.mkdir()
    (folder / "data.jsonl").write_bytes(QUESTIONS.read_bytes())
    hostile_folder(folder, marks)
    # With two processes, the build runs in a child, which has children of its own.
    done = run_in(
        folder,
        *(script("sfttrain"), "run", "data.jsonl", "--model", str(model), "--use_cpu"),
        *("--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--dataset_num_proc", "2"),
        SFTPREP_CACHE=str(tmp_path / "cache"),
    )
    assert (done.returncode, os.listdir(marks)) == (0, []), done.stderr


def test_workers_of_an_interactive_session_do_not_search_the_working_directory(tmp_path):
    marks = tmp_path / "marks"
    hostile_folder(tmp_path, marks)
    code = (
        "import sys\n"
        "path, sys.path = sys.path, [entry for entry in sys.path if entry]\n"
        "from sftprep.pipeline.executors.local import Processes\n"
        "sys.path = path\n"
        "pool = Processes(2)\n"
        "print(list(pool.map_unordered(len, ['ab'])))\n"
        "pool.close()"
    )
    done = run_in(tmp_path, sys.executable, "-c", code, PYTHONPATH=str(ROOT))
    assert (done.stdout.strip(), os.listdir(marks)) == ("[2]", []), done.stderr


def test_numba_takes_no_cache_from_the_working_directory(tmp_path):
    """Cached kernels are pickles, so a folder of them is code."""
    (tmp_path / ".numba_config.yaml").write_text(
        f"cache_dir: {tmp_path}\ncache_locator_classes: planted.Locator\n"
    )
    code = "import sftprep.packing.bestfit, numba; print(numba.config.CACHE_DIR == '')"
    done = run_in(tmp_path, sys.executable, "-P", "-c", code, PYTHONPATH=str(ROOT))
    assert done.stdout == "True\n", done.stderr
    assert os.listdir(tmp_path) == [".numba_config.yaml"]


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """An empty working directory for modules, which are unloaded afterwards."""
    before, path = set(sys.modules), list(sys.path)
    monkeypatch.chdir(tmp_path)
    user_functions._load_from.cache_clear()
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__spec__", None) is None or str(tmp_path) in str(
            getattr(sys.modules[name], "__file__", "")
        ):
            del sys.modules[name]
    sys.path[:] = path


def test_a_named_function_may_be_in_a_module_or_package_of_the_working_directory(
    in_folder, tokenizer_dir
):
    (in_folder / "own_package" / "deep").mkdir(parents=True)
    (in_folder / "own_package" / "__init__.py").write_text("from . import util")
    (in_folder / "own_package" / "util.py").write_text("GREETING = 'hello '")
    (in_folder / "own_package" / "deep" / "texts.py").write_text(
        "from ..util import GREETING\ndef greet(record): return GREETING + record['name']"
    )
    (in_folder / "own_module.py").write_text("def greet(record): return 'hi ' + record['name']")
    (in_folder / "data.jsonl").write_text(json.dumps({"name": "Ada"}) + "\n")
    for name in ("own_module:greet", "own_package.deep.texts:greet"):
        report = build(
            "data.jsonl", tokenizer=tokenizer_dir, output=name.partition(":")[0] + "-out",
            formatting_func=name, workers=2,
        )  # fmt: skip
        assert report.manifest.accounting.sequences == 1
    assert str(in_folder) not in sys.path


def test_imports_of_a_named_module_do_not_come_from_the_working_directory(in_folder):
    (in_folder / "helper_module.py").write_text("raise AssertionError('executed')")
    (in_folder / "named_module.py").write_text(
        "try:\n    import helper_module\nexcept ImportError:\n    pass\ndef f(record): return ''"
    )
    assert resolve_function("named_module:f").load()({}) == ""
    # Neither now nor later: some libraries import optional packages when they are first used.
    with pytest.raises(ImportError):
        __import__("helper_module")
    (in_folder / "needing_module.py").write_text("import helper_module")
    with pytest.raises(ConfigError, match="No module named 'helper_module'") as caught:
        resolve_function("needing_module:f").load()
    assert "other modules of its own package" in caught.value.remedy


def test_an_installed_module_wins_over_one_in_the_working_directory(in_folder):
    (in_folder / "pickle.py").write_text("raise AssertionError('executed')")
    assert resolve_function("pickle:dumps").load() is pickle.dumps


def test_a_module_that_raises_is_not_reused_half_initialized(in_folder):
    (in_folder / "broken_module.py").write_text("def f(record): return ''\nraise ValueError('no')")
    for _ in range(2):
        with pytest.raises(ConfigError, match="ValueError: no"):
            resolve_function("broken_module:f").load()
