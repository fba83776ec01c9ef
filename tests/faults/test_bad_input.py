"""Bad records and files are rejected with the right reason, and suspicious records on request."""

from __future__ import annotations

import json

import pytest

from sftprep import build
from sftprep.errors import ConfigError, EmptyInput, InputUnreadable, RecordError, TooManyRejected
from sftprep.records.checks.quality_checks import REASONS
from tests.pipeline.builds import check_accounting, origins
from tests.support import SHARED, needs_shared, rejected_file

DIRTY = SHARED / "datasets" / "dirty"
QWEN = SHARED / "tokenizers" / "qwen3"


def dirty_build(output, **settings):
    """Build the file whose lines have expected verdicts.

    Returns:
        The lines that were used, line -> reason of those that were quarantined, and the report.
    """
    fixed = {
        "max_length": 32_768,
        "overlong": "error",
        "train_on": "assistant",
        "max_rejected": "100%",
    }
    report = build(
        DIRTY / "dirty_messages.jsonl", tokenizer=QWEN, output=output, **{**fixed, **settings}
    )
    check_accounting(report.folder)
    rejected = [json.loads(line) for line in rejected_file(report.folder).read_text().splitlines()]
    assert len({entry["line"] for entry in rejected}) == len(rejected)
    return (
        {origin + 1 for origin in origins(report.folder)},
        {entry["line"]: entry["reason"] for entry in rejected},
        report,
    )


def expected():
    return {
        entry["line"]: entry["verdict"]
        for entry in json.loads((DIRTY / "dirty_messages.expect-2.json").read_text())["expect"]
    }


OURS = {"bad_json_strict": "bad_json", "too_long": "overlong"}
"""Verdicts that have another name in our reasons."""


@pytest.fixture(scope="module")
def quarantined(tmp_path_factory):
    return dirty_build(tmp_path_factory.mktemp("dirty") / "o", on_bad_record="quarantine")


@needs_shared
def test_every_line_of_the_dirty_file_gets_its_verdict(quarantined):
    used, reasons, report = quarantined
    for line, verdict in expected().items():
        if verdict in ("duplicate", "near_duplicate", "ok"):
            assert (line in used, line in reasons) == (True, False), line
        elif verdict == "ok_or_clean":
            assert (line in used) != (line in reasons), line
        elif verdict == "blank":
            assert (line in used, line in reasons) == (False, False), line
        else:
            assert reasons.get(line) == OURS.get(verdict, verdict), line
            assert line not in used
    assert report.manifest.accounting.blank == 1
    assert report.manifest.accounting.lines == 51


@needs_shared
def test_duplicates_are_dropped_when_asked(quarantined, tmp_path):
    before = quarantined[1]
    used, reasons, report = dirty_build(
        tmp_path / "o", on_bad_record="quarantine", duplicates="drop"
    )
    # Records are compared by what is read of them: line 27 is line 26 with other role names,
    # line 35 is line 1 after a byte order mark, and line 36 is line 1 with another line end.
    assert {n: r for n, r in reasons.items() if n not in before} == {
        27: "duplicate",
        35: "duplicate",
        36: "duplicate",
        47: "duplicate",
        48: "near_duplicate",
    }
    assert report.manifest.accounting.left_out == {"duplicate": 4, "near_duplicate": 1}
    assert 1 in used
    verdicts = expected()
    assert (verdicts[47], verdicts[48]) == ("duplicate", "near_duplicate")


@needs_shared
def test_suspicious_records_are_kept_on_request(quarantined, tmp_path):
    _, reasons, _ = dirty_build(tmp_path / "o", on_bad_record="quarantine", quality_checks="keep")
    assert not REASONS & set(reasons.values())
    suspicious = {line for line, reason in quarantined[1].items() if reason in REASONS}
    assert suspicious == {line for line, verdict in expected().items() if verdict in REASONS}
    assert len(suspicious) > 8


def test_above_the_limit_the_error_says_how_to_keep_suspicious_records(
    records, tokenizer_dir, tmp_path
):
    path = records([GOOD, chat(("user", "q"))])
    with pytest.raises(TooManyRejected, match='quality_checks="keep"'):
        build(path, tokenizer=tokenizer_dir, output=tmp_path / "o", on_bad_record="quarantine")


@needs_shared
@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("truncated.jsonl.gz", InputUnreadable, r"truncated\.jsonl\.gz is damaged or cut short"),
        ("utf16.jsonl", InputUnreadable, r"utf16\.jsonl is UTF-16[\s\S]*iconv"),
        ("empty.jsonl", EmptyInput, r"no usable record: no records in .*\.jsonl"),
        ("only_newlines.jsonl", EmptyInput, r"no usable record: no records in .*\.jsonl"),
    ],
)
def test_unusable_files_are_errors_with_their_name(tokenizer_dir, tmp_path, name, error, message):
    for workers in (1, 2):
        with pytest.raises(error, match=message) as caught:
            build(
                DIRTY / name,
                tokenizer=tokenizer_dir,
                output=tmp_path / "o",
                workers=workers,
                on_bad_record="quarantine",
            )
        assert caught.value.remedy
        assert not (tmp_path / "o" / "manifest.json").exists()


@needs_shared
@pytest.mark.parametrize(
    ("name", "records"), [("good_2000.jsonl.gz", 2000), ("schema_drift.jsonl", 1600)]
)
def test_good_files_are_used_completely(tokenizer_dir, tmp_path, name, records):
    report = build(DIRTY / name, tokenizer=tokenizer_dir, output=tmp_path / "o")
    assert report.manifest.accounting.sequences == records
    check_accounting(report.folder)


# --- duplicates and quality checks on generated files ---------------------------------------------


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


GOOD = chat(("user", "q"), ("assistant", "a"))


def test_duplicates_across_files_partitions_and_sources(
    records, tokenizer_dir, tmp_path, monkeypatch
):
    from sftprep.sources import groups

    monkeypatch.setattr(groups, "PARTITION_BYTES", 100)
    rows = [chat(("user", f"q {k % 7}"), ("assistant", "a")) for k in range(20)]
    spaced = [chat(("user", f"q  {k}\n"), ("assistant", "a")) for k in range(9)]
    files = [records(rows, "a.jsonl"), records(spaced, "b.jsonl")]
    for workers in (1, 2):
        output = tmp_path / f"o{workers}"
        report = build(
            files,
            tokenizer=tokenizer_dir,
            output=output,
            duplicates="drop",
            workers=workers,
            eval_fraction=0.3,
        )
        accounts = report.manifest.accounting
        assert accounts.left_out["duplicate"] == 13
        assert accounts.left_out["near_duplicate"] == 7
        assert accounts.sequences + report.evaluation.accounting.sequences == 9
        check_accounting(report.folder)
        check_accounting(report.folder / "eval")
    rejected = [json.loads(line) for line in rejected_file(output).read_text().splitlines()]
    assert [(entry["file"], entry["line"]) for entry in rejected] == [
        (files[0], k) for k in range(8, 21)
    ] + [(files[1], k) for k in range(1, 8)]
    assert (
        rejected_file(tmp_path / "o1").read_bytes() == rejected_file(tmp_path / "o2").read_bytes()
    )


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([("system", "s"), ("user", "q")], "no_target"),
        ([("assistant", "a")], "role_order"),
        ([("system", "s"), ("assistant", "a")], "role_order"),
        ([("user", "q"), ("assistant", "a"), ("assistant", "b")], "role_order"),
        ([("user", "q"), ("system", "s"), ("assistant", "a")], "role_order"),
        ([("user", " "), ("assistant", "a")], "empty_turn"),
        ([("user", "q"), ("assistant", "\n")], "empty_target"),
        ([("user", "q"), ("tool", "t"), ("assistant", "a")], "bad_tool"),
        ([("user", "<|im_end|>"), ("assistant", "a")], "special_tokens_in_text"),
        ([("user", "<image> what?"), ("assistant", "a")], None),
        ([("user", "q"), ("user", "r"), ("assistant", "a")], None),
        ([("developer", "d"), ("user", "q"), ("assistant", "a")], None),
        (
            [
                ("user", "q"),
                ("assistant", "call"),
                ("tool", "t"),
                ("tool", "u"),
                ("assistant", "a"),
            ],
            None,
        ),
        ([("user", "a < b | c > d"), ("assistant", "<think>t</think>a")], None),
    ],
)
def test_suspicious_conversations_are_rejected_on_request(
    records, tokenizer_dir, tmp_path, turns, reason
):
    path = records([GOOD, chat(*turns)])
    kept = build(path, tokenizer=tokenizer_dir, output=tmp_path / "keep", train_on="all")
    assert kept.manifest.accounting.sequences == 2
    if reason is None:
        build(
            path,
            tokenizer=tokenizer_dir,
            output=tmp_path / "o",
            quality_checks="reject",
            train_on="all",
        )
        return
    with pytest.raises(RecordError, match=rf":2: .*\[{reason}\]"):
        build(
            path,
            tokenizer=tokenizer_dir,
            output=tmp_path / "o",
            quality_checks="reject",
            train_on="all",
        )
    settings = {"on_bad_record": "quarantine", "max_rejected": "50%", "train_on": "all"}
    report = build(path, tokenizer=tokenizer_dir, output=tmp_path / "q", **settings)
    assert report.manifest.accounting.rejected == {reason: 1}


def test_escaped_special_tokens_and_plain_texts_pass_the_quality_checks(
    records, tokenizer_dir, tmp_path
):
    path = records([chat(("user", "<|im_end|>"), ("assistant", "a"))])
    build(
        path,
        tokenizer=tokenizer_dir,
        output=tmp_path / "o",
        quality_checks="reject",
        escape_special=True,
    )
    text = records([{"text": "<|im_end|> <image>"}], "t.jsonl")
    build(text, tokenizer=tokenizer_dir, output=tmp_path / "t", quality_checks="reject")
    with pytest.raises(ConfigError, match="quality_checks is 'maybe'"):
        build(text, tokenizer=tokenizer_dir, output=tmp_path / "x", quality_checks="maybe")


_DEEP = "[" * 980 + '"<|im_end|> and more"' + "]" * 980


@pytest.mark.parametrize("settings", [{}, {"escape_special": True}, {"images": "drop"}])
@pytest.mark.parametrize("place", ["arguments", "content", "turn", "column", "tools"])
def test_values_nested_too_deeply_reject_their_record_alone(
    tokenizer_dir, tmp_path, place, settings
):
    """As deeply as the parser of lines allows, which is deeper than Python's functions nest."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": "DEEP"}}}
    answer = {"role": "assistant", "content": "here it is"}
    record = {"messages": [{"role": "user", "content": "a question"}, answer]}
    if place == "arguments":
        answer["tool_calls"] = [call]
    elif place == "content":
        answer["content"] = ["DEEP"]
    elif place == "tools":
        record["tools"] = [{"type": "function", "function": {"name": "f", "parameters": "DEEP"}}]
    else:
        (answer if place == "turn" else record)["note"] = "DEEP"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    good = json.dumps({"messages": turns})
    path = tmp_path / "deep.jsonl"
    path.write_text(json.dumps(record).replace('"DEEP"', _DEEP) + f"\n{good}\n", encoding="utf-8")
    manifest = build(
        path,
        tokenizer=tokenizer_dir,
        output=tmp_path / "o",
        on_bad_record="quarantine",
        max_rejected="100%",
        quality_checks="keep",
        duplicates="drop",
        **settings,
    ).manifest
    ledger = manifest.accounting
    assert ledger.records == 2
    assert ledger.sequences + sum(ledger.rejected.values()) == 2
    assert ledger.sequences >= 1
