"""Records held out for evaluation: a separate build, no record in both, and the same records for
any order of the inputs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from sftprep import BuildConfig, build, open_shards, read_manifest, verify
from sftprep.errors import ConfigError, EmptyInput, OutputExists
from tests.conftest import EXAMPLES
from tests.pipeline.builds import check_accounting, content, origins, texts
from tests.support import rejected_file

CHATS = str(EXAMPLES / "data" / "chats.jsonl")
QA = str(EXAMPLES / "data" / "qa.jsonl")


def run(inputs, tokenizer_dir, output, **more):
    return build(
        BuildConfig.of(
            inputs=inputs, tokenizer=str(tokenizer_dir), output=str(output), max_length=256, **more
        )
    )


def test_every_record_is_in_the_training_or_the_evaluation_build(tokenizer_dir, tmp_path):
    report = run((CHATS, QA), tokenizer_dir, tmp_path / "o", eval_fraction=0.2)
    whole = run((CHATS, QA), tokenizer_dir, tmp_path / "whole")
    train, held = origins(report.folder), origins(report.folder / "eval")
    assert not set(train) & set(held)
    assert train + held == origins(whole.folder)
    assert sorted(texts(report.folder) + texts(report.folder / "eval")) == texts(whole.folder)
    assert 20 < len(held) < 90  # of 270
    for folder in (report.folder, report.folder / "eval"):
        check_accounting(folder)
    accounts, other = report.manifest.accounting, read_manifest(report.folder / "eval").accounting
    assert accounts.left_out == {"held_out": other.sequences}
    assert other.left_out == {"in_training": accounts.sequences}
    assert accounts.tokens_left_out["held_out"] == other.tokens
    assert report.evaluation is not None
    digest = read_manifest(report.folder / "eval").digest
    name = f"manifest-{digest[:16]}.json"
    assert report.manifest.eval == {"folder": "eval", "manifest": name, "digest": digest}
    assert {path.name for path in (report.folder / "eval").iterdir()} == {
        name,
        "groups",
        "shards",
    }


def test_the_same_records_are_held_out_in_any_order_and_kind_of_input(tokenizer_dir, tmp_path):
    lines = [
        line for file in (CHATS, QA) for line in Path(file).read_text().splitlines(keepends=True)
    ]
    one = run((CHATS, QA), tokenizer_dir, tmp_path / "one", eval_fraction=0.2)
    held = texts(one.folder / "eval")
    assert (
        texts(run((QA, CHATS), tokenizer_dir, tmp_path / "two", eval_fraction=0.2).folder / "eval")
        == held
    )
    # The seed of the packs does not matter; the seed of the hash does.
    by_seed = run((CHATS, QA), tokenizer_dir, tmp_path / "seed", eval_fraction=0.2, seed=9)
    assert texts(by_seed.folder / "eval") == held
    assert (
        texts(
            run(
                (CHATS, QA), tokenizer_dir, tmp_path / "other", eval_fraction=0.2, eval_seed=1
            ).folder
            / "eval"
        )
        != held
    )
    # Nor does the kind of file.
    rows = [json.loads(line) for line in Path(CHATS).read_text().splitlines()]
    (tmp_path / "a.json").write_text(
        json.dumps([dict(reversed(row.items())) for row in rows], indent=1)
    )
    kinds = [
        run(file, tokenizer_dir, tmp_path / f"k{n}", eval_fraction=0.2)
        for n, file in enumerate((CHATS, tmp_path / "a.json"))
    ]
    assert texts(kinds[0].folder / "eval") == texts(kinds[1].folder / "eval")
    # More records change nothing about those that were there.
    path = tmp_path / "more.jsonl"
    path.write_text("".join(reversed(lines[:150])))
    assert set(
        texts(run(str(path), tokenizer_dir, tmp_path / "part", eval_fraction=0.2).folder / "eval")
    ) <= set(held)


def test_equal_records_and_all_sequences_of_a_record_are_in_the_same_build(
    records, tokenizer_dir, tmp_path
):
    path = records([{"text": f"record {k % 20} " + "word " * 60} for k in range(60)])
    report = build(
        path,
        tokenizer=tokenizer_dir,
        output=tmp_path / "o",
        eval_fraction=0.3,
        overlong="split",
        max_length=16,
    )
    train, held = origins(report.folder), origins(report.folder / "eval")
    assert not set(train) & set(held)
    assert set(Counter(train + held).values()) == {next(iter(train.values()))}
    assert next(iter(train.values())) > 1
    assert {origin % 20 for origin in held}.isdisjoint({origin % 20 for origin in train})
    check_accounting(report.folder)
    check_accounting(report.folder / "eval")


def test_the_evaluation_may_have_another_packing(tokenizer_dir, tmp_path):
    report = run(CHATS, tokenizer_dir, tmp_path / "o", eval_fraction=0.3, eval_packing="none")
    assert all(len(pack.seq_lengths) == 1 for pack in open_shards(report.folder / "eval"))
    assert any(len(pack.seq_lengths) > 1 for pack in open_shards(report.folder))
    assert read_manifest(report.folder / "eval").plan["strategy"] == "none"


def test_the_evaluation_may_have_separate_inputs(tokenizer_dir, tmp_path):
    report = run(CHATS, tokenizer_dir, tmp_path / "o", eval_input=QA)
    assert content(run(CHATS, tokenizer_dir, tmp_path / "a").folder / "shards") == content(
        report.folder / "shards"
    )
    assert content(run(QA, tokenizer_dir, tmp_path / "b").folder / "shards") == content(
        report.folder / "eval" / "shards"
    )
    assert [i.path for i in read_manifest(report.folder / "eval").inputs] == [QA]
    assert read_manifest(report.folder / "eval").inputs[0].first_ordinal == 0
    with pytest.raises(ConfigError, match="named twice"):
        run(CHATS, tokenizer_dir, tmp_path / "o2", eval_input=CHATS)


def test_impossible_evaluation_settings_are_rejected(tokenizer_dir, tmp_path, records):
    for settings, message in [
        ({"eval_fraction": 1.0}, "eval_fraction is 1.0"),
        ({"eval_fraction": 0.1, "eval_input": "x"}, "eval_fraction and eval_input"),
        (
            {"eval_fraction": 0.1, "eval_packing": "none", "packing": "wrapped"},
            "cut sequences differently",
        ),
    ]:
        with pytest.raises(ConfigError, match=message):
            BuildConfig.of(**settings)
    with pytest.raises(ConfigError, match="no evaluation records"):
        run(CHATS, tokenizer_dir, tmp_path / "o4", eval_packing="none")
    few = records([{"text": "a b"}, {"text": "c d"}])
    with pytest.raises(EmptyInput, match="holds out no record of 2"):
        run(few, tokenizer_dir, tmp_path / "o", eval_fraction=0.0001)
    with pytest.raises(EmptyInput, match="every record"):
        run(few, tokenizer_dir, tmp_path / "o2", eval_fraction=0.9999)
    empty = records([{"text": ""}], "empty.jsonl")
    with pytest.raises(EmptyInput, match="to evaluate on"):
        run(few, tokenizer_dir, tmp_path / "o3", eval_input=empty)


def test_a_build_without_evaluation_removes_that_of_the_build_it_replaces(tokenizer_dir, tmp_path):
    run(CHATS, tokenizer_dir, tmp_path / "o", eval_fraction=0.3)
    run(CHATS, tokenizer_dir, tmp_path / "o", overwrite=True)
    assert content(tmp_path / "o") == content(run(CHATS, tokenizer_dir, tmp_path / "p").folder)
    assert read_manifest(tmp_path / "o").eval == {}


def test_a_folder_of_a_user_with_the_name_eval_is_not_changed(tokenizer_dir, tmp_path):
    for fresh in (True, False):
        if not fresh:
            run(CHATS, tokenizer_dir, tmp_path / "o", overwrite=True)
        (tmp_path / "o" / "eval").mkdir(parents=True, exist_ok=True)
        (tmp_path / "o" / "eval" / "mine.txt").write_text("mine")
        with pytest.raises(OutputExists):
            run(CHATS, tokenizer_dir, tmp_path / "o", overwrite=True, seed=1)
        assert (tmp_path / "o" / "eval" / "mine.txt").read_text() == "mine"
        (tmp_path / "o" / "eval" / "mine.txt").unlink()


def test_windows_pack_the_selected_sequences(tokenizer_dir, tmp_path):
    report = run((CHATS, QA), tokenizer_dir, tmp_path / "o", eval_fraction=0.2, pack_window=32)
    train, held = origins(report.folder), origins(report.folder / "eval")
    assert len(train) + len(held) == 270
    assert verify(report.folder).ok


def test_rejected_records_are_in_neither_build(tokenizer_dir, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(
        "".join(
            json.dumps({"text": f"text {k}"} if k % 5 else {"text": k}) + "\n" for k in range(50)
        )
    )
    report = run(
        str(path),
        tokenizer_dir,
        tmp_path / "o",
        eval_fraction=0.3,
        on_bad_record="quarantine",
        max_rejected="50%",
    )
    assert len(rejected_file(tmp_path / "o").read_text().splitlines()) == 10
    for folder in (report.folder, report.folder / "eval"):
        check_accounting(folder)
        assert read_manifest(folder).accounting.rejected == {"bad_type": 10}
