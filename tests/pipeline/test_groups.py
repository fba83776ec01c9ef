"""A build of many groups has the records of a build of one, and is traced to the same lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftprep import BuildReport, build, open_shards, verify
from sftprep.errors import EmptyInput, RecordError, TooManyRejected
from sftprep.sources.groups import cut_groups
from sftprep.sources.partition import PARTITION_BYTES, Source
from tests.pipeline.builds import check_accounting, content, texts
from tests.pipeline.group_inputs import GROUP_BYTES, WORDS, texts_of, write
from tests.support import rejected_entries


@pytest.fixture
def run(tokenizer_dir: Path, tmp_path: Path) -> Callable[..., BuildReport]:
    def run_build(inputs: Any, name: str, **more: Any) -> BuildReport:
        more = {"group_bytes": GROUP_BYTES, "max_length": 128, "workers": 1} | more
        data = () if inputs is None else (inputs,)
        report = build(*data, tokenizer=tokenizer_dir, output=tmp_path / name, **more)
        assert verify(report.folder).ok
        check_accounting(report.folder)
        return report

    return run_build


def locations(folder: Path) -> Counter[tuple[str, int]]:
    """Return the number of sequences of each line of the inputs."""
    shards = open_shards(folder)
    return Counter(
        shards.locate(index, number)
        for index, pack in enumerate(shards)
        for number in range(len(pack.seq_lengths))
    )


def test_many_groups_have_the_records_of_one(run: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", texts_of(2000))
    one, many = run(path, "one", group_bytes=1 << 30), run(path, "many")
    assert len(one.manifest.groups) == 1
    assert len(many.manifest.groups) == 5
    assert texts(many.folder) == texts(one.folder)
    assert locations(many.folder) == {(path, line): 1 for line in range(1, 2001)}
    assert many.manifest.accounting == one.manifest.accounting
    assert many.manifest.lengths == one.manifest.lengths
    assert [info.path for info in many.manifest.inputs] == [path]
    assert many.manifest.inputs[0].lines == 2000
    assert len({entry.key for entry in many.manifest.groups}) == 5
    two = run(path, "two", workers=2)
    assert content(two.folder) == content(many.folder)


def test_a_file_added_early_leaves_the_shards_of_later_groups_unchanged(
    run: Any, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for number in range(100):
        write(tmp_path / "in" / f"{number:03d}.jsonl", texts_of(100, number, str(number)))
    before = run(str(tmp_path / "in"), "before", group_bytes=1 << 18)
    write(tmp_path / "in" / "0000.jsonl", texts_of(300, 999, "new"))
    after = run(str(tmp_path / "in"), "after", group_bytes=1 << 18)
    old, new = ([entry.digest for entry in report.manifest.groups] for report in (before, after))
    assert len(old) > 5
    assert set(old[2:]) <= set(new)


def test_the_shares_of_a_mixture_are_exact_over_all_groups(run: Any, tmp_path: Path) -> None:
    names = {"a": (900, 3.0, 1.0), "b": (1500, 1.0, 1.0), "c": (700, 2.0, 1.5)}
    sources = tuple(
        {
            "path": write(tmp_path / f"{name}.jsonl", texts_of(count, 1, name)),
            "name": name,
            "repeat": repeat,
            "weight": weight,
        }
        for name, (count, weight, repeat) in names.items()
    )
    one = run(None, "one", sources=sources, group_bytes=1 << 30)
    many = run(None, "many", sources=sources)
    assert len(many.manifest.groups) > 3
    for report in (one, many):
        found = {source.name: source.sequences for source in report.manifest.sources}
        assert found == {"a": 900, "b": 300, "c": 600}
        assert {s.name: s.weight for s in report.manifest.sources} == {"a": 3, "b": 1, "c": 2}
    assert many.reused == sum(len(group.inputs[0].slices) for group in many.manifest.read_groups())


def test_records_equal_to_those_of_another_group_are_dropped(run: Any, tmp_path: Path) -> None:
    rows = texts_of(1500)
    spaced = [{"text": row["text"].replace(" ", "  ")} for row in rows[300:400]]
    path = write(tmp_path / "a.jsonl", [*rows, *rows[100:200], *spaced, *rows[:50]])
    one = run(path, "one", duplicates="drop", group_bytes=1 << 30)
    many = run(path, "many", duplicates="drop")
    assert len(many.manifest.groups) > 3
    expected = {"duplicate": 150, "near_duplicate": 100}
    for report in (one, many):
        assert report.manifest.accounting.left_out == expected
    assert locations(many.folder) == locations(one.folder)
    lines = [entry["line"] for entry in rejected_entries(many.folder)]
    assert lines == list(range(1501, 1751))


def test_a_mixture_counts_what_is_left_after_duplicates_and_held_out_records(
    run: Any, tmp_path: Path
) -> None:
    rows = texts_of(1200)
    sources = (
        {"path": write(tmp_path / "a.jsonl", [*rows, *rows[:600]]), "name": "a", "weight": 1},
        {"path": write(tmp_path / "b.jsonl", texts_of(900, 2, "b")), "name": "b", "weight": 1},
    )
    more = {"sources": sources, "duplicates": "drop", "eval_fraction": 0.1}
    one, many = run(None, "one", group_bytes=1 << 30, **more), run(None, "many", **more)
    assert len(many.manifest.groups) > 3
    assert texts(many.folder / "eval") == texts(one.folder / "eval")
    for name in ("sequences", "left_out", "rejected"):
        found = (getattr(report.manifest.accounting, name) for report in (one, many))
        assert next(found) == next(found)
    assert [s.sequences for s in many.manifest.sources] == [
        s.sequences for s in one.manifest.sources
    ]


def test_held_out_records_are_those_of_one_group_and_packed_together(
    run: Any, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", texts_of(2000))
    one = run(path, "one", eval_fraction=0.05, group_bytes=1 << 30)
    many = run(path, "many", eval_fraction=0.05)
    assert texts(many.folder / "eval") == texts(one.folder / "eval")
    assert many.evaluation is not None
    assert one.evaluation is not None
    assert many.evaluation.rows == one.evaluation.rows
    assert len(many.evaluation.groups) == 1
    assert locations(many.folder / "eval") == locations(one.folder / "eval")
    assert not locations(many.folder).keys() & locations(many.folder / "eval").keys()


def test_separate_evaluation_inputs_are_one_group(run: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", texts_of(2000))
    other = write(tmp_path / "b.jsonl", texts_of(1000, 5, "b"))
    report = run(path, "many", eval_input=(other,))
    assert locations(report.folder / "eval") == {(other, line): 1 for line in range(1, 1001)}
    assert verify(report.folder / "eval").ok
    assert report.evaluation is not None
    assert len(report.evaluation.groups) == 1
    assert report.evaluation.inputs[0].lines == 1000


def test_rejected_records_and_warnings_have_the_lines_of_their_file(
    run: Any, tmp_path: Path
) -> None:
    rows: list[Any] = texts_of(2000)
    for line in (5, 1200, 1900):
        rows[line - 1] = "{"
    path = write(tmp_path / "a.jsonl", rows)
    report = run(path, "o", on_bad_record="quarantine")
    found = rejected_entries(report.folder)
    assert [(entry["file"], entry["line"]) for entry in found] == [
        (path, line) for line in (5, 1200, 1900)
    ]
    rows[4] = rows[1199] = {"text": "a"}
    write(tmp_path / "a.jsonl", rows)
    for workers in (1, 2):
        with pytest.raises(RecordError) as caught:
            run(path, f"p{workers}", workers=workers)
        assert (caught.value.file, caught.value.line) == (path, 1900)
    with pytest.raises(TooManyRejected, match="1 of 2,000") as refused:
        run(path, "q", on_bad_record="quarantine", max_rejected="0")
    assert f"{path}:1900" in str(refused.value)
    # Held-out records have no rejected ones of their own, and are no reason for another error.
    with pytest.raises(TooManyRejected, match="1 of 2,000"):
        run(path, "r", on_bad_record="quarantine", max_rejected="0", eval_fraction=0.1)


def test_the_first_record_of_a_warning_is_found_in_a_later_group(run: Any, tmp_path: Path) -> None:
    rows = texts_of(2000)
    rows[1499] = {"text": " ".join(WORDS * 90)}
    path = write(tmp_path / "a.jsonl", rows)
    report = run(path, "o", overlong="drop", max_length=512)
    assert report.manifest.accounting.dropped == {"overlong": 1}
    assert report.manifest.locate_first("dropped.overlong") == (path, 1500)
    first = report.manifest.inputs[0].first_lines
    assert first["dropped.overlong"] == 1500


def test_groups_with_the_same_records_have_their_own_files(run: Any, tmp_path: Path) -> None:
    rows = texts_of(700)
    paths = tuple(write(tmp_path / f"{name}.jsonl", rows) for name in "abc")
    report = run(paths, "o", group_bytes=1 << 17)
    assert len(report.manifest.groups) == 3
    assert len({entry.key for entry in report.manifest.groups}) == 3
    assert locations(report.folder) == {(path, line): 1 for path in paths for line in range(1, 701)}


def test_a_group_without_a_usable_record_has_no_shards(run: Any, tmp_path: Path) -> None:
    rows: list[Any] = [*texts_of(500), *("{" + "x" * 500,) * 400, *texts_of(500, 3)]
    path = write(tmp_path / "a.jsonl", rows)
    report = run(path, "o", on_bad_record="quarantine", max_rejected="100%")
    packs = [len(entry.packs) for entry in report.manifest.groups]
    assert 0 in packs
    assert report.manifest.accounting.rejected == {"bad_json": 400}
    assert len(open_shards(report.folder)) == report.manifest.rows
    with pytest.raises(EmptyInput, match="no usable record in 1 input file"):
        run(
            write(tmp_path / "b.jsonl", ["{" + "x" * 500] * 400),
            "p",
            on_bad_record="quarantine",
            max_rejected="100%",
        )


def test_tables_are_cut_at_rows(run: Any, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = texts_of(3000)
    table = pa.table({"text": [row["text"] for row in rows]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100, compression="none")
    with pa.ipc.new_file(tmp_path / "b.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    one = run(str(tmp_path / "a.parquet"), "one", group_bytes=1 << 30)
    for name in ("a.parquet", "b.arrow"):
        many = run(str(tmp_path / name), f"of-{name}")
        assert len(many.manifest.groups) > 3
        assert texts(many.folder) == texts(one.folder)
        assert locations(many.folder) == {
            (str(tmp_path / name), line): 1 for line in range(1, 3001)
        }


SIZES = st.lists(st.integers(0, 3_000_000) | st.integers(0, 70_000), min_size=1, max_size=40)


@settings(deadline=None)
@given(sizes=SIZES, group_bytes=st.sampled_from([1 << 16, 1 << 20, 3 << 20]))
def test_groups_have_every_byte_once(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], group_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("f")
    inputs = []
    for number, size in enumerate(sizes):
        path = folder / f"{number}.jsonl"
        with open(path, "wb") as file:
            file.truncate(size)
        inputs.append((number, Source(str(path)), size))
    groups = list(cut_groups(inputs, group_bytes))
    found: dict[int, list[tuple[int, int]]] = {}
    for group in groups:
        counted = 0
        for member in group:
            end = sizes[member.input] if member.source.end is None else member.source.end
            found.setdefault(member.input, []).append((member.source.start, end))
            counted += max(1 << 16, end - member.source.start)
        assert group
        assert counted <= max(group_bytes, 1 << 16)
        assert len(group) == 1 or all(m.source.end is None for m in group)
    assert [*found] == list(range(len(sizes)))
    for number, ranges in found.items():
        assert [0, *(end for _, end in ranges)] == [*(start for start, _ in ranges), sizes[number]]


def test_a_group_of_the_usual_size_ends_where_a_slice_ends() -> None:
    source = Source("/dev/null")
    groups = list(cut_groups([(0, source, 1000)], 1 << 30))
    assert len(groups) == 1
    assert (1 << 30) % PARTITION_BYTES == 0
