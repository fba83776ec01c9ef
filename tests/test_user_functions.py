"""Functions of users, by name and as objects: what other processes receive, and stable digests."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import textwrap
from functools import partial, wraps
from pathlib import Path

import pytest

import sftprep
from sftprep import BuildConfig
from sftprep.config.passed_functions import PassedFunction
from sftprep.config.user_functions import resolve_function, to_function_setting
from sftprep.errors import ConfigError, InputChanged
from tests.conftest import EXAMPLES

GREETING = "hello"
ROOT = Path(__file__).resolve().parents[1]


def greet(record):
    return GREETING + record["name"] + punctuation()


def punctuation():
    return "!"


class Greeter:
    def __init__(self, greeting):
        self.greeting = greeting

    def __call__(self, record):
        return self.greeting + record["name"]


def loaded_elsewhere(function, folder: Path) -> str:
    """Return what a function makes of a record in a process without this module and folder."""
    payload = folder / "function.pickle"
    payload.write_bytes(pickle.dumps(PassedFunction.of(function)))
    code = (
        f"import pickle; f = pickle.load(open({str(payload)!r}, 'rb')).load();"
        " print(f({'name': 'Ada'}))"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_functions_reach_another_process_with_the_values_that_they_use(tmp_path, monkeypatch):
    assert loaded_elsewhere(lambda record: greet(record), tmp_path) == "helloAda!"  # noqa: PLW0108
    assert loaded_elsewhere(Greeter("hi "), tmp_path) == "hi Ada"
    monkeypatch.setattr(sys.modules[__name__], "GREETING", "bye ")
    assert loaded_elsewhere(greet, tmp_path) == "bye Ada!"


def test_modules_that_only_this_process_finds_are_imported_from_their_files(tmp_path, monkeypatch):
    code = tmp_path / "code"
    (code / "helper_package").mkdir(parents=True)
    (code / "helper_package" / "__init__.py").write_text("from helper_of_helper import MARK\n")
    (code / "helper_of_helper.py").write_text("MARK = '?'\n")
    monkeypatch.syspath_prepend(str(code))
    import helper_package  # type: ignore[import-not-found]

    assert loaded_elsewhere(lambda record: record["name"] + helper_package.MARK, tmp_path) == "Ada?"


def digest_in_new_process(script: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


DIGEST_SCRIPT = """
    import re, sys
    from sftprep.config.user_functions import to_function_setting
    WORDS, PATTERN = {"one", "two", "three"}, re.compile("a+")
    UNUSED = object()
    SETTING = sys.argv[1]
    def helper(record):
        return [SETTING for _ in record]
    def function(record):
        return helper(record) if record in WORDS or PATTERN.search("a") else {"x", "y"}
    print(to_function_setting(function, "transform").digest)
"""


def test_the_digest_of_a_function_is_stable_and_has_the_values_that_it_uses(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(DIGEST_SCRIPT))
    first, again = (digest_in_new_process(script, "a") for _ in range(2))
    assert first == again != "None"
    assert digest_in_new_process(script, "b") != first
    script.write_text(textwrap.dedent(DIGEST_SCRIPT) + "# changed\n")
    assert digest_in_new_process(script, "a") != first


def test_functions_without_a_source_of_their_own_have_no_stable_digest():
    def nested(record):
        return ""

    decorated = wraps(greet)(lambda record: "")
    objects = (Greeter("a"), Greeter("a").__call__, partial(greet), str.upper)
    for function in (lambda record: "", nested, decorated, *objects):
        assert to_function_setting(function, "transform").digest is None
    assert to_function_setting(greet, "transform").digest


def test_settings_of_functions_are_equal_only_if_the_functions_are():
    def make(value):
        return lambda record: value

    one, same, other = (PassedFunction.of(make(value)) for value in ("a", "a", "b"))
    assert one == same != other
    assert hash(one) == hash(same)
    assert str(one) == str(other)
    assert pickle.loads(pickle.dumps(one)) == one
    config = BuildConfig.of(transform=make("a"), inputs="-")
    assert json.loads(json.dumps(config.flat()))["transform"].endswith("<lambda>")
    assert BuildConfig.of(**config.flat()) == config


def test_a_file_that_changes_is_loaded_again(tmp_path):
    file = tmp_path / "mine.py"
    found = []
    for value in ("a", "b"):
        file.write_text(f"def f(record):\n    return {value!r}\n")
        found.append(
            (resolve_function(f"{file}:f").load()({}), resolve_function(f"{file}:f").digest)
        )
    assert [value for value, _ in found] == ["a", "b"]
    assert found[0][1] != found[1][1]


def test_only_the_named_file_is_executed_and_the_search_path_stays(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "mine.py").write_text("import sibling\ndef f(record):\n    return record\n")
    (folder / "sibling.py").write_text("raise AssertionError('executed')")
    monkeypatch.chdir(folder)
    before = list(sys.path)
    with pytest.raises(ConfigError, match="No module named 'sibling'"):
        resolve_function("mine.py:f").load()
    (folder / "mine.py").write_text("def f(record):\n    return record\n")
    assert resolve_function("mine.py:f").load()({"a": 1}) == {"a": 1}
    assert sys.path == before
    assert "sibling" not in sys.modules


def test_a_build_in_a_child_process_receives_functions_by_value(tokenizer_dir, tmp_path):
    output = tmp_path / "o"
    sftprep.build_in_subprocess(
        BuildConfig.of(
            inputs=str(EXAMPLES / "data" / "qa.jsonl"),
            tokenizer=str(tokenizer_dir),
            output=str(output),
            transform=lambda record: {"text": greet({"name": str(len(record))})},
            workers=2,
        )
    )
    assert sftprep.read_manifest(output).inputs[0].format == "text"


@pytest.mark.parametrize("wrong", [5, ["a:b"], {"a": 1}])
def test_a_setting_that_is_no_function_is_an_error(wrong):
    with pytest.raises(ConfigError, match="transform is"):
        BuildConfig.of(transform=wrong)


def test_a_file_that_changes_while_it_is_in_use_is_an_error_in_another_process(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def f(record):\n    return 'a'\n")
    function = resolve_function(f"{file}:f")
    sent = pickle.dumps(function)
    assert pickle.loads(sent).load()({}) == "a"
    file.write_text("def f(record):\n    return 'b'\n")
    assert function.load()({}) == "a"
    with pytest.raises(InputChanged, match=r"mine\.py:f changed"):
        pickle.loads(sent).load()
