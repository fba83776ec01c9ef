"""Malicious files are an error that names them: pipes, huge numbers, deep nesting, exits."""

from __future__ import annotations

import os
import re
import shutil

import pytest

from sftprep import build
from sftprep.config import read_config_file
from sftprep.config.user_functions import resolve_function
from sftprep.errors import ConfigError, InputUnreadable, RecordError, TokenizerError
from sftprep.sources.partition import cut, read_partition
from sftprep.sources.readers.jsonl import parse_line, split_lines
from sftprep.sources.readers.to_jsonl import rows_to_lines
from sftprep.tokenize.loading.load import load_tokenizer
from tests.support import at_most, rejected_file

HUGE = "7" * 5_000
"""An integer that Python does not convert."""
DEEP = "[" * 200_000 + "]" * 200_000


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "vocab.json",
        "additional_chat_templates/tool.jinja",
    ],
)
def test_a_file_of_a_tokenizer_that_is_not_regular_is_an_error(kind, name, tokenizer_dir, tmp_path):
    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_dir, folder)
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with at_most(20), pytest.raises(TokenizerError, match=f"{path.name} is not a regular file"):
        load_tokenizer(str(folder), cache=tmp_path / "cache")


def test_a_config_of_a_model_that_is_nested_too_deeply_is_an_error(tokenizer_dir, tmp_path):
    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_dir, folder)
    (folder / "config.json").write_text(f'{{"model_type": {DEEP}}}')
    with pytest.raises(TokenizerError, match=f"{folder}.*RecursionError"):
        load_tokenizer(str(folder), cache=tmp_path / "cache")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"a: {DEEP}", "nested too deeply"),
        (f'{{"a": {DEEP}}}', "nested too deeply"),
        (f"max_length: {HUGE}", "is not YAML"),
    ],
)
def test_a_config_file_with_huge_values_is_an_error(text, said, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"c\.yaml .*{said}"):
        read_config_file(str(tmp_path / "c.yaml"))


# --- documents ------------------------------------------------------------------------------------


def records_of(path):
    lines = [line for part in cut([str(path)]) for line in split_lines(read_partition(part))]
    return [parse_line(line, number) for number, line in enumerate(lines)]


@pytest.mark.parametrize("around", ["[%s]", '{"version": %s, "data": [%s]}'])
def test_a_huge_integer_in_a_document_is_one_bad_record(around, tmp_path):
    path = tmp_path / "a.json"
    elements = f'{{"text": "a"}}, {{"text": {HUGE}}}, {{"text": "b"}}'
    path.write_text(
        around.replace("%s", HUGE, 1) % elements if "{" in around else around % elements
    )
    first, bad, last = records_of(path)
    assert (first, last) == ({"text": "a"}, {"text": "b"})
    assert (bad.reason, bad.line) == ("bad_json", 1)


def test_a_huge_integer_is_named_by_file_and_line(tokenizer_dir, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(f'[{{"text": "a"}}, {{"text": "b", "n": {HUGE}}}]')
    with pytest.raises(RecordError, match=r"a\.json:2"):
        build(path, tokenizer=tokenizer_dir, output=tmp_path / "o")


def test_a_huge_integer_on_the_first_line_of_a_document(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(f'{{"text": {HUGE}}}\n{{"text": "b"}}\n')
    bad, good = records_of(path)
    assert (bad.reason, good) == ("bad_json", {"text": "b"})


@pytest.mark.parametrize("text", ['{"a": %s}', '{"a": %s, "data": [{"text": "a"}]}', '[{"a": %s}]'])
def test_a_document_that_is_nested_too_deeply_is_an_error(text, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text % DEEP)
    with pytest.raises(InputUnreadable, match=r"a\.json .*nested too deeply"):
        records_of(path)


def test_rows_in_memory_that_cannot_be_shown_are_bad_records():
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    rows = [
        {"text": int("7" * 4_000) ** 2},
        {"text": deep},
        {"text": "a"},
        10**5_000,
        {1: 10**9999},
    ]
    lines = split_lines(rows_to_lines(rows))  # type: ignore[arg-type]
    found = [parse_line(line, number) for number, line in enumerate(lines)]
    assert found[2] == {"text": "a"}
    assert [found[k].reason for k in (0, 1, 3, 4)] == ["bad_type", "bad_row", "bad_row", "bad_row"]


# --- functions ------------------------------------------------------------------------------------


def test_a_module_that_exits_cannot_be_loaded(tmp_path):
    (tmp_path / "exits.py").write_text("def f(record): return 'a'\nraise SystemExit(0)\n")
    with pytest.raises(ConfigError, match=r"cannot load .*SystemExit"):
        resolve_function(f"{tmp_path}/exits.py:f")


def test_a_function_that_exits_makes_the_record_bad(tokenizer_dir, tmp_path):
    (tmp_path / "exits.py").write_text("import sys\ndef f(record): sys.exit(0)\n")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(RecordError, match=r"a\.jsonl:1: the formatting function raised SystemExit"):
        build(
            tmp_path / "a.jsonl",
            tokenizer=tokenizer_dir,
            output=tmp_path / "o",
            formatting_func=f"{tmp_path}/exits.py:f",
        )


# --- tool calls -----------------------------------------------------------------------------------

_NESTED = "[" * 990 + "1" + "]" * 990
"""Nesting that the parser of JSON lines accepts and that of Python rejects."""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (f'{{"x": {HUGE}}}', "bad_json"),
        (f'{{"x": {_NESTED}, "y": 12345678901234567890123}}', "nested too deeply"),
        (f'{{"x": {_NESTED}}}', "nested too deeply|recursion"),
        ('"' + "[" * 100_000 + '"', "bad_tool"),
    ],
)
def test_a_tool_call_that_cannot_be_written_is_one_bad_record(
    arguments, said, tokenizer_dir, tmp_path
):
    call = f'{{"type": "function", "function": {{"name": "f", "arguments": {arguments}}}}}'
    asked, answered = '{"role": "user", "content": "a"}', '"role": "assistant", "content": "b"'
    plain = f'{{"messages": [{asked}, {{{answered}}}]}}'
    talk = f'{{"messages": [{asked}, {{{answered}, "tool_calls": [{call}]}}]}}'
    (tmp_path / "a.jsonl").write_text(f"{plain}\n{talk}\n{plain}\n")
    (tmp_path / "tools.jinja").write_text(TOOLS)
    made = build(
        tmp_path / "a.jsonl",
        tokenizer=tokenizer_dir,
        output=tmp_path / "o",
        on_bad_record="quarantine",
        max_rejected="100%",
        chat_template=tmp_path / "tools.jinja",
    )
    assert made.manifest.accounting.records == 3
    rejected = rejected_file(tmp_path / "o").read_text() if said else ""
    assert made.manifest.accounting.sequences == (2 if said else 3)
    assert not said or re.search(said, rejected)


TOOLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>\n"
    "{% endfor %}"
)
