"""Formats that pass 1 handles separately: pre-tokenized rows, user functions, ambiguous rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from sftprep import build
from sftprep.config import BuildConfig
from sftprep.config.user_functions import resolve_function
from sftprep.errors import ConfigError
from sftprep.pipeline.prepare.setup import prepare_recipe
from tests.semantics.conftest import CHATML
from tests.semantics.prepared import prepare
from tests.support import SHARED, needs_shared


def shout(record):
    """A formatting function."""
    return f"{record['a'].upper()}!"


def test_pretokenized_rows_remain_separate_sequences(tokenizer_dir):
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "seq_lengths": [2, 3], "labels": [5, 6, -100, 8, 9]},
        {"input_ids": [], "labels": []},
        {"input_ids": [600]},
        {"input_ids": [1, 2]},
    ]
    made = prepare(rows, tokenizer_dir)
    assert made.batch.input_ids.tolist() == [5, 6, 7, 8, 9, 1, 2]
    assert made.batch.lengths.tolist() == [2, 3, 2]
    assert made.batch.completion_mask.tolist() == [True, True, False, True, True, True, True]
    assert made.batch.line_of.tolist() == [0, 0, 3]
    assert [(r.line, r.reason) for r in made.batch.rejected] == [(2, "bad_ids")]
    assert made.batch.rejected[0].excerpt == '{"input_ids": [600]}'
    counts = made.batch.counts
    assert (
        counts["records"] + counts["extra.pretokenized_rows"]
        == counts["sequences"] + counts["dropped.no_token"] + 1
    )


def test_pretokenized_rows_are_cut_like_others(tokenizer_dir):
    made = prepare([{"input_ids": list(range(10))}], tokenizer_dir, max_length=4, overlong="split")
    assert [made.batch.input_ids[made.slice(k)].tolist() for k in range(3)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
    ]


@pytest.mark.parametrize(
    ("mask", "train_on", "fine"),
    [
        ({}, "all", True),
        ({}, "completion", False),
        ({}, "assistant", False),
        ({"labels": [1, 2]}, "last-assistant", False),
        ({"labels": [1, 2]}, "assistant", True),
        ({"completion_mask": [0, 1]}, "completion", True),
        ({"completion_mask": [0, 1]}, "assistant", False),
        ({"assistant_masks": [0, 1]}, "assistant", True),
        ({"assistant_masks": [0, 1]}, "completion", False),
    ],
)
def test_pretokenized_rows_must_contain_the_mask_of_train_on(
    records, tokenizer_dir, tmp_path, mask, train_on, fine
):
    path = records([{"input_ids": [1, 2], **mask}])
    settings = {"tokenizer": tokenizer_dir, "output": tmp_path / "o", "train_on": train_on}
    if fine:
        assert build(path, **settings).manifest.trained_tokens == 1
    else:
        with pytest.raises(ConfigError, match=f'train_on="{train_on}": .* holds tokens'):
            build(path, **settings)


def test_tokens_have_no_turns_to_expand(records, tokenizer_dir, tmp_path):
    with pytest.raises(ConfigError, match=r'reasoning="expand": .* holds tokens'):
        build(
            records([{"input_ids": [1, 2]}]),
            tokenizer=tokenizer_dir,
            output=tmp_path / "o",
            expand_turns=True,
        )


def test_rows_with_a_prompt_text_and_messages_are_conversations(folder_with):
    messages = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]
    row = {"prompt": "One?", "prompt_id": "7", "messages": messages}
    assert (
        prepare([row], folder_with(CHATML)).text()
        == prepare([{"messages": messages}], folder_with(CHATML)).text()
    )


def test_a_formatting_function_is_passed_as_an_object(tokenizer_dir):
    assert resolve_function(f"{__name__}:shout").load() is shout
    made = prepare([{"a": "b"}, {"x": 1}], tokenizer_dir, formatting_func=shout)
    assert made.trained() == ["B!<|im_end|>"]
    assert [r.reason for r in made.batch.rejected] == ["function_failed"]


def test_a_function_can_return_several_texts(tokenizer_dir, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def several(record):\n    return [record['a'], record['a'] * 2]\n")
    made = prepare([{"a": "b"}], tokenizer_dir, formatting_func=f"{file}:several")
    assert [made.text(0), made.text(1)] == ["b<|im_end|>", "bb<|im_end|>"]
    assert made.batch.counts["extra.texts"] == 1
    assert made.batch.line_of.tolist() == [0, 0]


def test_the_source_of_the_function_is_part_of_the_recipe(tokenizer_dir, tmp_path):
    digests = []
    for number, body in enumerate(("return 'a'", "return 'b'")):
        file = tmp_path / f"{number}" / "mine.py"
        file.parent.mkdir()
        file.write_text(f"def f(record):\n    {body}\n")
        settings = {
            "inputs": "-",
            "output": "-",
            "tokenizer": str(tokenizer_dir),
            "formatting_func": f"{file}:f",
        }
        assert resolve_function(f"{file}:f").digest
        digests.append(prepare_recipe(BuildConfig.of(**settings))[0].digest)
    assert digests[0] != digests[1]


def test_names_of_functions_that_do_not_exist_are_rejected():
    for name in ("json", "json:nothing", "no_such_module_:f", ":f", "nowhere/at_all.py:f"):
        with pytest.raises(ConfigError):
            resolve_function(name).load()


def test_a_function_of_the_working_directory_is_found(monkeypatch, tmp_path):
    (tmp_path / "module_of_a_user.py").write_text("def f(record):\n    return 'a'\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert resolve_function("module_of_a_user:f").load()({}) == "a"


@needs_shared
def test_all_role_names_of_the_data_files_are_known():
    names = [
        "axolotl_conversation",
        "fastchat_dummy_conversation",
        "glaive_toolcall_en_demo",
        "glaive_toolcall_zh_demo",
        "torchtune_chat_tiny",
    ]
    for name in names:
        lines = (SHARED / "datasets" / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line][:60]
        made = prepare(rows, Path(SHARED / "tokenizers" / "qwen3"), max_length=100_000)
        assert made.batch.rejected == []
        assert len(made) == len(rows)
