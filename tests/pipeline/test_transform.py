"""A transform makes records of records: its results are read like lines of a file, and every record
is in the shards or counted, with its line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sftprep import BuildConfig, Drop, build, read_manifest
from sftprep.cli import main
from sftprep.config.passed_functions import PassedFunction
from sftprep.config.user_functions import resolve_function
from sftprep.errors import EmptyInput, RecordError
from sftprep.pipeline.executors.local import Processes
from tests.pipeline.builds import check_accounting, content, origins, texts
from tests.support import rejected_file

MINE = """
from sftprep import Drop

def to_chat(record):
    if record["lang"] != "en":
        return Drop("other_language")
    turns = zip(record["questions"], record["answers"])
    return [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in turns
    ]
"""
PAGES = [
    {"lang": "en", "questions": ["How?", "Why?"], "answers": ["So.", "Thus."], "page": 1},
    {"lang": "de", "questions": ["Wie?"], "answers": ["So."], "page": 2},
    {"lang": "en", "questions": [], "answers": [], "page": 3},
    {"lang": "en", "questions": ["What?"], "answers": ["That."], "page": 4},
    {"lang": "de", "questions": ["Was?"], "answers": ["Das."], "page": 5},
]
CHATS = [
    {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
    for q, a in (("How?", "So."), ("Why?", "Thus."), ("What?", "That."))
]


def run(source, tokenizer_dir, output, **more):
    settings = {"tokenizer": str(tokenizer_dir), "output": str(output), "max_length": 256}
    return build(source, **settings, **more)


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return f"{path}:to_chat"


def test_the_results_are_read_in_their_own_format_with_its_masks(
    records, mine, tokenizer_dir, tmp_path
):
    made = run(
        records(PAGES), tokenizer_dir, tmp_path / "o", transform=mine, train_on="assistant"
    ).manifest
    same = run(
        records(CHATS, "c.jsonl"), tokenizer_dir, tmp_path / "s", train_on="assistant"
    ).manifest
    assert texts(tmp_path / "o") == texts(tmp_path / "s")
    assert made.trained_tokens == same.trained_tokens < made.tokens
    assert made.inputs[0].format == "messages"


def test_the_accounting_names_every_dropped_record_with_its_first_line(
    records, mine, tokenizer_dir, tmp_path
):
    path = records(PAGES)
    run(path, tokenizer_dir, tmp_path / "o", transform=mine)
    manifest = read_manifest(tmp_path / "o")
    assert (manifest.accounting.records, manifest.accounting.sequences) == (5, 3)
    assert manifest.accounting.dropped == {"other_language": 2, "transform": 1}
    assert manifest.accounting.extra == {"transform": 1}
    assert manifest.inputs[0].first_lines == {
        "dropped.other_language": 2,
        "dropped.transform": 3,
    }
    assert origins(tmp_path / "o") == {0: 2, 3: 1}
    check_accounting(tmp_path / "o")


def test_the_command_line_shows_the_first_line_of_each_reason(
    records, mine, tokenizer_dir, tmp_path, capsys
):
    path = records(PAGES)
    arguments = ["build", path, "--transform", mine, "--tokenizer", str(tokenizer_dir)]
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--output", str(tmp_path / "o")])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if "dropped: other language" in line]
    assert line.split()[-3:] == ["2", "first:", f"{path}:2"]


def test_the_transform_sees_the_record_before_map_and_detection(records, tokenizer_dir, tmp_path):
    seen = []

    def shorten(record):
        seen.append(record)
        return {"q": record["deep"]["q"], "a": record["deep"]["a"]}

    path = records([{"deep": {"q": "Q?", "a": " A."}, "n": 12345678901234567890123}])
    run(path, tokenizer_dir, tmp_path / "o", transform=shorten, map="q=prompt,a=completion")
    assert texts(tmp_path / "o") == texts_of([{"prompt": "Q?", "completion": " A."}], tokenizer_dir)
    assert seen[-1]["n"] == 12345678901234567890123


def texts_of(rows, tokenizer_dir):
    with tempfile.TemporaryDirectory() as folder:
        run(rows, tokenizer_dir, Path(folder) / "o")
        return texts(Path(folder) / "o")


def test_a_formatting_function_formats_what_the_transform_returns(tokenizer_dir, tmp_path):
    run(
        [{"a": "one two"}],
        tokenizer_dir,
        tmp_path / "o",
        transform=lambda record: [{"w": word} for word in record["a"].split()],
        map="w=word",
        formatting_func=lambda record: [record["word"], record["word"].upper()],
    )
    expected = [{"text": text} for text in ("one", "ONE", "two", "TWO")]
    assert texts(tmp_path / "o") == texts_of(expected, tokenizer_dir)


def test_an_exception_names_the_line_of_the_record(records, tokenizer_dir, tmp_path):
    path = records([{"text": "a"}, {"no": 1}, {"text": "b"}])
    with pytest.raises(RecordError) as caught:
        run(path, tokenizer_dir, tmp_path / "o", transform=lambda r: {"text": r["text"]})
    assert (caught.value.line, caught.value.reason) == (2, "transform_failed")
    assert "KeyError: 'text'" in str(caught.value)


class Unprintable(Exception):
    def __str__(self):
        raise ValueError("no text")


def fail_as_asked(record):
    kind = record["kind"]
    if kind == "exit":
        sys.exit(3)
    if kind == "recursion":
        return fail_as_asked(record)
    if kind == "unprintable":
        raise Unprintable
    if kind == "surrogate":
        raise ValueError("half \ud800")
    if kind == "generator":
        return (1 / 0 for _ in range(2))
    values = {"text": "not a record", "number": 5, "set": {"a"}, "mixed": [{"text": "a"}, 7]}
    return values.get(kind, {"text": "fine"})


def test_whatever_a_transform_raises_or_returns_is_a_bad_record(records, tokenizer_dir, tmp_path):
    kinds = ["exit", "recursion", "unprintable", "surrogate", "generator"]
    kinds += ["text", "number", "set", "mixed", "fine"]
    report = run(
        records([{"kind": kind} for kind in kinds]),
        tokenizer_dir,
        tmp_path / "o",
        transform=fail_as_asked,
        on_bad_record="quarantine",
        max_rejected="100%",
    )
    assert report.manifest.accounting.rejected == {"transform_failed": 9}
    assert report.manifest.accounting.sequences == 1
    lines = rejected_file(tmp_path / "o").read_text().splitlines()
    assert [json.loads(line)["line"] for line in lines] == list(range(1, 10))


def test_values_that_are_not_json_are_bad_records_with_their_line(tokenizer_dir, tmp_path):
    values = ["fine", "\ud800", b"bytes", {"a": {1}}, ("a", "b"), 5, None, float("nan")]
    report = run(
        [{"k": k} for k in range(len(values))],
        tokenizer_dir,
        tmp_path / "o",
        transform=lambda record: {"text": values[record["k"]]},
        on_bad_record="quarantine",
        max_rejected="100%",
    )
    assert report.manifest.accounting.sequences == 1
    rejected = rejected_file(tmp_path / "o").read_text().splitlines()
    assert [json.loads(line)["line"] for line in rejected] == list(range(2, 9))


def test_a_bad_result_among_several_is_named_and_the_others_are_used(tokenizer_dir, tmp_path):
    report = run(
        [{}],
        tokenizer_dir,
        tmp_path / "o",
        transform=lambda record: [{"text": "a"}, {"text": 7}, {"text": "b"}],
        on_bad_record="quarantine",
        max_rejected="100%",
    )
    assert report.manifest.accounting.sequences == 2
    (line,) = rejected_file(tmp_path / "o").read_text().splitlines()
    assert json.loads(line)["message"].endswith("(result 2 of 3)")


def test_a_reason_of_the_engine_and_many_reasons_stay_exact_in_the_accounting(
    tokenizer_dir, tmp_path
):
    def drop(record):
        n = record["n"]
        if n < 3:
            return Drop("no_trained_token")
        return Drop(f"id {n}.\x1b[2J") if n < 300 else {"prompt": "a", "completion": str(n % 2)}

    report = run([{"n": n} for n in range(302)], tokenizer_dir, tmp_path / "o", transform=drop)
    dropped = report.manifest.accounting.dropped
    assert dropped["no_trained_token (transform)"] == 3
    assert sum(dropped.values()) == 300
    assert len(dropped) <= 52
    assert {f"dropped.{reason}" for reason in dropped} >= set(report.manifest.inputs[0].first_lines)
    assert all(reason.isprintable() for reason in dropped)
    check_accounting(tmp_path / "o")


def test_a_transform_that_keeps_nothing_is_an_empty_input(tokenizer_dir, tmp_path):
    with pytest.raises(EmptyInput, match="dropped: transform 3"):
        run([{"a": 1}] * 3, tokenizer_dir, tmp_path / "o", transform=lambda record: None)


def test_the_format_is_detected_behind_a_thousand_dropped_records(tokenizer_dir, tmp_path):
    report = run(
        [{"n": n} for n in range(1200)],
        tokenizer_dir,
        tmp_path / "o",
        transform=lambda r: {"prompt": "a", "completion": "b"} if r["n"] > 1100 else None,
    )
    assert report.manifest.inputs[0].format == "prompt-completion"
    assert report.manifest.accounting.sequences == 99


RESULTS = {
    "good": lambda text: {"text": text},
    "bad": lambda text: {"text": 5},
    "drop": lambda text: Drop("asked"),
    "none": lambda text: None,
}


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(plans=st.lists(st.lists(st.sampled_from(sorted(RESULTS)), max_size=3), min_size=1))
def test_every_record_of_a_transform_with_up_to_three_results_is_accounted_for(
    plans, tokenizer_dir
):
    plans = [["good"], *plans]  # so that the build is not empty

    def carry_out(record):
        number = record["number"]
        return [RESULTS[what](f"{number} {k}") for k, what in enumerate(plans[number])]

    found = Counter(what for plan in plans for what in plan or ["none"])
    with tempfile.TemporaryDirectory() as folder:
        report = run(
            [{"number": number} for number in range(len(plans))],
            tokenizer_dir,
            Path(folder) / "o",
            transform=carry_out,
            on_bad_record="quarantine",
            max_rejected="100%",
        )
        ledger = report.manifest.accounting
        assert (ledger.records, ledger.sequences) == (len(plans), found["good"])
        assert ledger.rejected == ({"bad_type": found["bad"]} if found["bad"] else {})
        assert ledger.dropped.get("asked", 0) == found["drop"]
        assert ledger.dropped.get("transform", 0) == found["none"]
        assert ledger.extra.get("transform", 0) == found.total() - len(plans)
        expected = {number: plan.count("good") for number, plan in enumerate(plans)}
        assert origins(Path(folder) / "o") == +Counter(expected)
        check_accounting(Path(folder) / "o")


def spread(record):
    """Return 0 to 3 records."""
    return [{"text": f"{record['text']} {k}"} for k in range(len(record["text"]) % 4)]


@pytest.fixture
def files(records):
    return [records([{"text": "x" * (n + f)} for n in range(40)], f"{f}.jsonl") for f in range(6)]


def test_the_bytes_do_not_depend_on_the_number_of_workers(files, tokenizer_dir, tmp_path):
    for function in (spread, lambda record: [*spread(record)]):
        made = []
        for workers in (1, 3):
            folder = tmp_path / f"{function.__name__}{workers}"
            run(
                files, tokenizer_dir, folder, transform=function, workers=workers, eval_fraction=0.2
            )
            made.append(content(folder))
        assert made[0] == made[1]


def test_duplicates_are_found_among_the_results_of_one_record(tokenizer_dir, tmp_path):
    report = run(
        [{"n": 1}, {"n": 2}],
        tokenizer_dir,
        tmp_path / "o",
        transform=lambda r: [
            {"text": "same", "n": r["n"]},
            {"text": "same"},
            {"text": str(r["n"])},
        ],
        duplicates="drop",
    )
    assert report.manifest.accounting.left_out == {"duplicate": 3}
    assert origins(tmp_path / "o") == {0: 2, 1: 1}


def test_each_source_of_a_mixture_may_have_its_own_transform(
    records, mine, tokenizer_dir, tmp_path
):
    pages, plain = records(PAGES, "pages.jsonl"), records(CHATS[:1], "plain.jsonl")
    config = tmp_path / "mixture.yaml"
    config.write_text(
        f"sources:\n- path: {pages}\n  transform: {mine}\n- path: {plain}\n"
        f"tokenizer: {tokenizer_dir}\noutput: {tmp_path / 'o'}\n"
    )
    with pytest.raises(SystemExit) as caught:
        main(["build", "--config", str(config)])
    assert caught.value.code == 0
    manifest = read_manifest(tmp_path / "o")
    assert [info.accounting.sequences for info in manifest.inputs] == [3, 1]
    assert [each["name"] for each in manifest.functions["used"]] == [mine]
    of_python = BuildConfig.of(
        sources=[{"path": pages, "transform": lambda r: {"text": "a"}}, {"path": plain}],
        tokenizer=str(tokenizer_dir),
        output=str(tmp_path / "p"),
    )
    assert [info.format for info in build(of_python).manifest.inputs] == ["text", "messages"]


def test_results_are_reused_only_while_the_function_is_known_to_be_the_same(
    files, tokenizer_dir, tmp_path
):
    def reused(transform, **more):
        made = run(
            files[:1], tokenizer_dir, tmp_path / "o", transform=transform, keep_spill=True,
            overwrite=True, **more,
        )  # fmt: skip
        assert made.manifest.functions["used"][0]["reused"] == (
            isinstance(transform, str) or transform is spread or bool(more)
        )
        return made.reused or int(made.is_up_to_date)

    assert (reused(spread), reused(spread)) == (0, 1)
    file = tmp_path / "mine.py"
    for body in ("'a'", "'b'"):
        file.write_text(f"def f(record):\n    return {{'text': {body}}}\n")
        assert (reused(f"{file}:f"), reused(f"{file}:f")) == (0, 1)
    key = ["x"]
    closure = lambda record: {"text": key[0]}  # noqa: E731
    assert reused(closure) == 0
    key[0] = "y"
    assert reused(closure) == 0
    assert (reused(closure, transform_id="1"), reused(closure, transform_id="1")) == (0, 1)
    assert reused(closure, transform_id="2") == 0


def test_a_function_that_no_worker_can_receive_runs_in_this_process(
    files, tokenizer_dir, tmp_path, caplog
):
    lock = threading.Lock()

    def guarded(record):
        with lock:
            return {"text": "a"}

    for workers in (1, 2):
        run(files, tokenizer_dir, tmp_path / f"{workers}", transform=guarded, workers=workers)
    assert "cannot be passed to another process: TypeError" in caplog.text
    assert texts(tmp_path / "1") == texts(tmp_path / "2")


def apply_to_record(spec):
    """Return the results of a function in this process, and the process."""
    function, record = spec
    return os.getpid(), resolve_function(function).load()(record)


def test_worker_processes_run_a_function_that_only_this_process_knows():
    prefix = "a "
    function = PassedFunction.of(lambda record: prefix + record["text"])
    pool = Processes(1)
    ((process, result),) = pool.map_unordered(apply_to_record, [(function, {"text": "b"})])
    pool.close()
    assert (process != os.getpid(), result) == (True, "a b")


SCRIPT = """
import sys, sftprep
open({runs!r}, "a").write("run\\n")
WORDS = {{"a", "b"}}
def to_text(record):
    return {{"text": record["text"] + " ".join(sorted(WORDS))}}
report = sftprep.build({files!r}, transform={function}, tokenizer={tokenizer!r},
    output={output!r}, workers=3, keep_spill=True, overwrite=True,
    seed=len(open({runs!r}).readlines()))
print(report.reused, report.manifest.functions["used"][0]["reused"])
"""


@pytest.mark.parametrize("function", ["to_text", "lambda r: to_text(r)"])
@pytest.mark.parametrize("stdin", [True, False])
def test_a_script_runs_once_and_its_functions_work_in_workers(
    files, tokenizer_dir, tmp_path, function, stdin
):
    runs = tmp_path / "runs.txt"
    names = {"runs": str(runs), "files": files, "tokenizer": str(tokenizer_dir)}
    script = SCRIPT.format(**names, output=str(tmp_path / "o"), function=function)
    path = tmp_path / "script.py"
    path.write_text(script)
    outputs = []
    for _ in range(2):
        command = [sys.executable, "-" if stdin else str(path)]
        done = subprocess.run(
            command, input=script if stdin else None, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout.split())
    assert runs.read_text() == "run\n" * 2
    is_known = function == "to_text" and not stdin
    assert outputs == [["0", str(is_known)], ["6" if is_known else "0", str(is_known)]]


def test_a_special_token_in_the_text_of_a_function_is_counted_and_escaped(tokenizer_dir, tmp_path):
    def to_text(record):
        return {"text": "a <|im_" + "start|> b"}

    counted = run([{"n": 1}], tokenizer_dir, tmp_path / "o", transform=to_text).manifest
    assert counted.accounting.warnings == {"special_token_in_content": 1}
    escaped = run(
        [{"n": 1}], tokenizer_dir, tmp_path / "e", transform=to_text, escape_special=True
    ).manifest
    assert escaped.tokens > counted.tokens


def test_a_transform_of_a_table_sees_all_columns(tokenizer_dir, tmp_path):
    pq.write_table(pa.table({"asked": ["a b"], "meta": [{"k": [1, 2]}]}), tmp_path / "t.parquet")
    run(
        str(tmp_path / "t.parquet"),
        tokenizer_dir,
        tmp_path / "o",
        transform=lambda r: {"text": r["asked"] + str(r["meta"]["k"])},
    )
    assert texts(tmp_path / "o") == texts_of([{"text": "a b[1, 2]"}], tokenizer_dir)


def test_an_interrupted_build_resumes_with_the_same_bytes(files, tokenizer_dir, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import os, time\n"
        "def f(record):\n"
        "    if 'INTERRUPT' in os.environ and len(record['text']) > 41:\n"
        "        time.sleep(1.2)  # partitions of a second ago are stored by then\n"
        "        len(record['text']) > 42 and os._exit(9)\n"
        "    return [{'text': record['text'] + str(k)} for k in range(len(record['text']) % 4)]\n"
    )
    command = [sys.executable, "-m", "sftprep", "build", *files, "--transform", f"{file}:f"]
    command += ["--tokenizer", str(tokenizer_dir), "--workers", "1", "--json", "--output"]
    killed = subprocess.run(
        [*command, str(tmp_path / "o")],
        env={**os.environ, "INTERRUPT": "1"},
        capture_output=True,
        check=False,
    )
    assert killed.returncode == 9
    reused = []
    for folder in ("o", "whole"):
        done = subprocess.run([*command, str(tmp_path / folder)], capture_output=True, check=True)
        reused.append(json.loads(done.stdout)["reused_partitions"])
    assert 0 < reused[0] < len(files)
    assert content(tmp_path / "o") == content(tmp_path / "whole")


def test_a_bad_result_has_no_position_within_the_line(tokenizer_dir, tmp_path):
    with pytest.raises(RecordError) as caught:
        run(
            [{"text": "a"}],
            tokenizer_dir,
            tmp_path / "o",
            transform=lambda record: {"text": "a", "long": "b" * 90, "x": 10**400},
        )
    assert (caught.value.line, caught.value.column) == (1, 0)
    assert "correct the record, or the function of" in str(caught.value)
