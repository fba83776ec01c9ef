"""The ledgers of the inputs of a build are verified."""

from __future__ import annotations

from typing import Any

from sftprep import build, verify
from tests.conftest import EXAMPLES
from tests.shards.builds import rewritten


def test_a_ledger_of_an_input_that_does_not_balance_is_a_problem(tokenizer_dir, tmp_path):
    folder = build(
        EXAMPLES / "data" / "chats.jsonl",
        tokenizer=tokenizer_dir,
        output=tmp_path / "o",
        max_length=256,
    ).folder

    def add_record(values: dict[str, Any]) -> None:
        values["inputs"][0]["accounting"]["records"] += 1

    rewritten(folder, add_record)
    problems = verify(folder).problems
    assert any("does not balance" in problem for problem in problems)
    assert any("do not sum" in problem for problem in problems)
