"""A build in parts has the bytes of a build of one process, whatever happens to the parts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sftprep import BuildReport, PartReport, build, verify
from sftprep.cli import main
from sftprep.errors import ConfigError, OutputBusy, OutputExists
from tests.pipeline.builds import content
from tests.pipeline.group_inputs import GROUP_BYTES, spy_on_reads, texts_of, write

Run = Callable[..., Any]


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, str]:
    """Six groups; some records are equal to one of another group, or cannot be used."""
    rows: list[Any] = texts_of(1200)
    rows[1000:1100] = rows[100:200]
    rows[30] = rows[900] = "{"
    return {
        "a": write(tmp_path / "a.jsonl", rows),
        "b": write(tmp_path / "b.jsonl", texts_of(900, 2, "b")),
    }


@pytest.fixture
def run(inputs: dict[str, str], tokenizer_dir: Path, tmp_path: Path) -> Run:
    def run_build(name: str = "o", **more: Any) -> Any:
        fixed = {"group_bytes": GROUP_BYTES, "max_length": 128, "workers": 1}
        fixed |= {"tokenizer": tokenizer_dir, "on_bad_record": "quarantine"}
        data = [] if "sources" in more else [[*inputs.values()]]
        return build(*data, output=tmp_path / name, **(fixed | more))

    return run_build


@pytest.fixture
def mixture(inputs: dict[str, str]) -> dict[str, Any]:
    sources = [
        {"path": inputs["a"], "name": "a", "weight": 2},
        {"path": inputs["b"], "name": "b", "weight": 1},
    ]
    return {"sources": sources, "duplicates": "drop", "eval_fraction": 0.1}


def test_four_parts_and_the_finishing_build_have_the_bytes_of_one_process(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = run("golden", eval_fraction=0.05)
    total = len(golden.manifest.groups)
    assert total == 6
    reports: list[PartReport] = []
    for number in (3, 1, 4, 2):
        reports.append(run(part=f"{number}/4", eval_fraction=0.05))
        assert not (tmp_path / "o" / "manifest.json").exists()
    assert [(each.groups, each.groups_done) for each in reports] == [(1, 1), (2, 3), (1, 4), (2, 6)]
    assert all((each.groups_total, each.waiting_for) == (6, ()) for each in reports)
    for spill in (tmp_path / "o" / "spill").glob("[0-9a-f]*.arrow"):
        spill.unlink()
    reads = spy_on_reads(monkeypatch)
    finished = run(eval_fraction=0.05)
    assert reads == []
    assert content(finished.folder) == content(golden.folder)
    assert finished.bytes_read == golden.bytes_read
    assert verify(finished.folder).ok


def test_a_mixture_without_duplicates_needs_each_part_three_times(
    run: Run, mixture: dict[str, Any], tmp_path: Path
) -> None:
    waiting = [
        run(part=f"{number}/2", **mixture).waiting_for for _ in range(3) for number in (1, 2)
    ]
    # The last part of a round continues with the next one.
    assert waiting == [(2,), (1,), (), (), (), ()]
    finished = run(**mixture)
    golden = run("golden", **mixture)
    assert content(finished.folder) == content(golden.folder)


def test_the_finishing_build_does_what_is_missing(
    run: Run, mixture: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, more in (("plain", {}), ("mixture", mixture)):
        run(name, part="1/3", **more)
        run(name, part="3/3", **more)
        with monkeypatch.context() as context:
            reads = spy_on_reads(context)
            finished = run(name, **more)
        if not more:  # only the groups of part 2
            assert reads == [("a.jsonl", GROUP_BYTES), ("b.jsonl", GROUP_BYTES)]
        assert content(finished.folder) == content(run(f"golden-{name}", **more).folder)


def test_a_part_that_is_run_twice_does_nothing_twice(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def times() -> dict[str, int]:
        files = [path for path in (tmp_path / "o").rglob("*") if path.name != "lock"]
        return {str(path): path.stat().st_mtime_ns for path in files if path.is_file()}

    first = run(part="2/3")
    before = times()
    reads = spy_on_reads(monkeypatch)
    again = run(part="2/3")
    assert reads == []
    assert again.groups_done == first.groups_done == 2
    assert again.bytes_read == first.bytes_read
    assert times() == before


def test_equal_files_in_different_parts_are_kept_apart(tokenizer_dir: Path, tmp_path: Path) -> None:
    rows: list[Any] = [*texts_of(350), "{"]
    paths = [write(tmp_path / f"{name}.jsonl", rows) for name in "abc"]
    more: dict[str, Any] = {"group_bytes": GROUP_BYTES, "max_length": 128, "workers": 1}
    more |= {"on_bad_record": "quarantine", "tokenizer": tokenizer_dir}
    golden = build(paths, output=tmp_path / "golden", **more)
    assert len(golden.manifest.groups) == 3
    for part in ("1/3", "2/3", "3/3", "2/3"):
        build(paths, output=tmp_path / "o", part=part, **more)
    finished = build(paths, output=tmp_path / "o", **more)
    assert content(finished.folder) == content(golden.folder)


def test_parts_replace_a_finished_build_only_on_request(run: Run, tmp_path: Path) -> None:
    run(seed=1)
    before = content(tmp_path / "o")
    with pytest.raises(OutputExists, match="holds a finished build"):
        run(part="1/2")
    assert content(tmp_path / "o") == before
    for part in ("1/2", "2/2"):
        run(part=part, overwrite=True)
        assert before.items() <= content(tmp_path / "o").items()
    assert content(run(overwrite=True).folder) == content(run("golden").folder)


def test_parts_of_different_commands_are_refused(
    run: Run, inputs: dict[str, str], tokenizer_dir: Path, tmp_path: Path
) -> None:
    run(part="1/4")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"max_length": 64}, "max_length is 64 here, and 128 there"),
        ({"max_rejected": "5%"}, "max_rejected is '5%' here, and '1%' there"),
        ({"seed": 7}, "seed is 7 here, and 0 there"),
    ]
    for more, difference in cases:
        for part in ("2/4", None):
            with pytest.raises(ConfigError) as caught:
                run(part=part, **more)
            assert difference in str(caught.value)
            assert "use the same command for all parts, apart from part" in str(caught.value)
    # Another number of parts is not another build.
    run(part="2/6")
    tokenizer = tmp_path / "other"
    shutil.copytree(tokenizer_dir, tokenizer)
    os.utime(inputs["b"], ns=(1, 1))
    with pytest.raises(ConfigError, match=r"the input .*b\.jsonl has changed"):
        run(part="2/4")
    (tmp_path / "o" / "spill" / "parts.json").unlink()
    assert content(run().folder) == content(run("golden").folder)


def test_what_cannot_be_done_in_parts_is_refused(
    run: Run, inputs: dict[str, str], tokenizer_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text("def keep(record):\n    return record\n")
    own = f"{tmp_path}/own.py:keep"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"pack_window": 64}, "leave out part"),
        ({"limit": 5}, "leave out part"),
        ({"transform": lambda record: record}, "leave out part"),
        ({"executor": "ray"}, "leave out part"),
        ({"part": "3/2"}, "write I/K"),
        ({"part": "0/2"}, "write I/K"),
        ({"part": "2"}, "write I/K"),
    ]
    for more, remedy in cases:
        with pytest.raises(ConfigError) as caught:
            run(**{"part": "1/2"} | more)
        assert remedy in caught.value.remedy, more
    with pytest.raises(ConfigError, match="data in memory"):
        build([{"text": "a"}], tokenizer=tokenizer_dir, output=tmp_path / "o", part="1/2")
    assert not (tmp_path / "o").exists()
    run(part="1/2", transform=own)


def test_a_build_does_not_finish_parts_that_still_run(run: Run, tmp_path: Path) -> None:
    refused = []

    def finish_meanwhile(stage: str, done: int, total: int) -> None:
        if stage == "write" and not refused:
            with pytest.raises(OutputBusy) as caught:
                run()
            refused.append(str(caught.value))

    run(part="1/2", progress=finish_meanwhile)
    assert len(refused) == 1
    started, may_end = threading.Event(), threading.Event()

    def wait(stage: str, done: int, total: int) -> None:
        started.set()
        assert may_end.wait(30)

    finishing = threading.Thread(target=run, kwargs={"progress": wait})
    finishing.start()
    assert started.wait(30)
    with pytest.raises(OutputBusy, match="another build"):
        run(part="2/2")
    may_end.set()
    finishing.join()
    assert content(tmp_path / "o") == content(run("golden").folder)


def test_a_part_says_what_is_next(
    run: Run,
    inputs: dict[str, str],
    mixture: dict[str, Any],
    tokenizer_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"sources": mixture["sources"], "duplicates": "drop"}))
    command = ["build", "--config", str(config), "--tokenizer", str(tokenizer_dir)]
    command += ["--output", str(tmp_path / "o"), "--group-bytes", "65536", "--max-length", "128"]
    command += ["--on-bad-record", "quarantine", "--workers", "1"]

    def show(*more: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main([*command, *more])
        assert ended.value.code == 0
        return capsys.readouterr().out

    first = json.loads(show("--part", "1/2", "--json"))
    assert (first["next"], first["waiting_for"], first["groups_done"]) == (
        "run_parts_again",
        [2],
        0,
    )
    assert "run all parts once more" in show("--part", "1/2")
    show("--part", "2/2")
    show("--part", "1/2")
    show("--part", "2/2")
    last = show("--part", "1/2")
    assert "6 of 6 groups done" in last
    assert "next: all groups are done: run the same command without --part" in last
    assert json.loads(show("--json"))["packs"] > 0
    single = run("p", part="1/2")
    assert (single.groups_done, single.groups_total, single.waiting_for) == (3, 6, ())


def test_parts_may_run_at_the_same_time(
    inputs: dict[str, str], run: Run, tokenizer_dir: Path, tmp_path: Path
) -> None:
    golden: BuildReport = run("golden")
    script = (
        "import sys, sftprep; sftprep.build(sys.argv[3:], tokenizer=sys.argv[2], output='o',"
        f" part=sys.argv[1], group_bytes={GROUP_BYTES}, max_length=128, workers=1,"
        " on_bad_record='quarantine')"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", script, part, str(tokenizer_dir), *inputs.values()],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        # The same part twice, as when a job is started again before the first one has ended.
        for part in ("1/2", "2/2", "2/2")
    ]
    assert [child.wait() for child in children] == [0, 0, 0]
    assert content(run().folder) == content(golden.folder)
