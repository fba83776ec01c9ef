"""Builds in older versions of the format are readable, and pass verification."""

from __future__ import annotations

import json

from sftprep import build, open_shards, read_manifest, verify
from sftprep.report.summary import source_ledgers
from tests.conftest import EXAMPLES

NEW_IN_1_1 = ("left_out", "extra", "tokens_left_out", "tokens_extra")


def test_a_build_of_version_1_0_is_read_and_verified(tokenizer_dir, tmp_path):
    folder = build(
        EXAMPLES / "data" / "chats.jsonl",
        tokenizer=tokenizer_dir,
        output=tmp_path / "o",
        max_length=256,
    ).folder
    before = read_manifest(folder)
    raw = json.loads((folder / "manifest.json").read_bytes())
    del raw["eval"]
    raw["format_version"] = "1.0"
    for info in raw["inputs"]:
        del info["source"], info["accounting"], info["limit"]
    for name in NEW_IN_1_1:
        del raw["accounting"][name]
    (folder / "manifest.json").write_text(json.dumps(raw))
    manifest = read_manifest(folder)
    assert (manifest.format_version, manifest.eval) == ("1.0", {})
    assert manifest.accounting == before.accounting
    assert verify(folder).ok
    assert len(open_shards(folder)) == before.rows
    assert manifest.locate(3) == before.locate(3)
    assert [name for name, _ in source_ledgers(manifest)] == [before.inputs[0].path]


def test_a_ledger_of_an_input_that_does_not_balance_is_a_problem(tokenizer_dir, tmp_path):
    folder = build(
        EXAMPLES / "data" / "chats.jsonl",
        tokenizer=tokenizer_dir,
        output=tmp_path / "o",
        max_length=256,
    ).folder
    raw = json.loads((folder / "manifest.json").read_bytes())
    raw["inputs"][0]["accounting"]["records"] += 1
    (folder / "manifest.json").write_text(json.dumps(raw))
    problems = verify(folder).problems
    assert any("does not balance" in problem for problem in problems)
    assert any("do not sum" in problem for problem in problems)
