"""A mixture determines how often each record is in the build: exactly, for any number of workers,
and with an accounting that balances."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sftprep import BuildConfig, build, read_manifest
from sftprep.cli import main
from sftprep.config import SourceEntry
from sftprep.errors import ConfigError, EmptyInput, RecordError
from sftprep.report.source_summary import source_ledgers
from tests.pipeline.builds import check_accounting, content, origins, texts
from tests.sources.test_kinds import WRITERS


@pytest.fixture
def files(tmp_path):
    """Three files of texts: a, b and c with 40, 30 and 10 records."""
    made = {}
    for name, rows in (("a", 40), ("b", 30), ("c", 10)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(
            "".join(
                json.dumps({"text": f"{name} {k} " + "word " * (k % 7)}) + "\n" for k in range(rows)
            )
        )
        made[name] = str(path)
    return made


def run(sources, tokenizer_dir, output, **more):
    return build(
        BuildConfig.of(
            sources=sources, tokenizer=str(tokenizer_dir), output=str(output), max_length=64, **more
        )
    )


def by_source(report):
    """Return the number of sequences of each record in the build, by source and line."""
    found: dict[str, Counter[int]] = {}
    for origin, times in origins(report.folder).items():
        path, line = report.manifest.locate(origin)
        found.setdefault(path[-7], Counter())[line] += times
    check_accounting(report.folder)
    return found


def test_records_are_repeated_whole_and_in_part(files, tokenizer_dir, tmp_path):
    sources = [
        {"path": files["a"], "repeat": 2},
        {"path": files["b"], "repeat": 0.5},
        {"path": files["c"], "repeat": 1.3},
    ]
    report = run(sources, tokenizer_dir, tmp_path / "o")
    found = by_source(report)
    assert set(found["a"].values()) == {2}
    assert len(found["a"]) == 40
    assert (len(found["b"]), set(found["b"].values())) == (15, {1})
    assert Counter(found["c"].values()) == {1: 7, 2: 3}
    accounts = dict(source_ledgers(report.manifest))
    assert accounts[files["a"]].extra == {"repeated": 40}
    assert accounts[files["b"]].left_out == {"not_sampled": 15}
    assert accounts[files["c"]].extra == {"repeated": 3}
    # Another seed selects other records; the same seed selects the same, in any order of sources.
    assert by_source(run(sources, tokenizer_dir, tmp_path / "s", seed=1))["b"] != found["b"]
    assert by_source(run(sources[::-1], tokenizer_dir, tmp_path / "r"))["b"] == found["b"]


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ((1, 1, 1), (10, 10, 10)),
        ((2, 1, 1), (20, 10, 10)),
        ((4, 3, 1), (40, 30, 10)),
        ((1, 1, 0.1), (30, 30, 3)),
    ],
)
def test_weights_are_shares_of_records(files, tokenizer_dir, tmp_path, weights, counts):
    sources = [
        {"path": files[name], "weight": weight} for name, weight in zip("abc", weights, strict=True)
    ]
    found = by_source(run(sources, tokenizer_dir, tmp_path / "o"))
    assert tuple(len(found[name]) for name in "abc") == counts
    assert all(times == 1 for own in found.values() for times in own.values())


def test_a_weighted_source_may_be_repeated_to_reach_its_share(files, tokenizer_dir, tmp_path):
    sources = [{"path": files["a"], "weight": 1}, {"path": files["c"], "weight": 1, "repeat": 3}]
    found = by_source(run(sources, tokenizer_dir, tmp_path / "o"))
    assert (sum(found["a"].values()), sum(found["c"].values())) == (30, 30)
    assert set(found["c"].values()) == {3}


def test_records_after_the_limit_of_a_source_are_not_read(files, tokenizer_dir, tmp_path):
    with open(files["b"], "a") as file:
        file.write("not read\n")
    sources = [{"path": files["a"], "limit": 7}, {"inputs": [files["b"], files["c"]], "limit": 30}]
    report = run(sources, tokenizer_dir, tmp_path / "o")
    assert {name: len(own) for name, own in by_source(report).items()} == {"a": 7, "b": 30}
    with pytest.raises(RecordError, match=r"b\.jsonl:31"):
        run([{"path": files["b"]}], tokenizer_dir, tmp_path / "o2")
    report = build(
        files["a"], tokenizer=tokenizer_dir, output=tmp_path / "o3", limit=5, max_length=64
    )
    assert report.manifest.accounting.records == 5


def test_each_source_may_have_another_format(files, tokenizer_dir, tmp_path):
    qa = tmp_path / "qa.jsonl"
    qa.write_text('{"question": "Why?", "answer": "So.", "body": "ignored"}\n' * 3)
    raw = tmp_path / "raw.jsonl"
    raw.write_text('{"question": "Why?", "answer": "So.", "body": "read this"}\n')
    sources = [
        files["c"],
        {"path": str(qa), "map": "question=prompt,answer=completion", "name": "questions"},
        {"path": str(raw), "format": "text", "text-field": "body"},
    ]
    report = run(sources, tokenizer_dir, tmp_path / "o")
    assert [i.format for i in report.manifest.inputs] == ["text", "prompt-completion", "text"]
    assert [name for name, _ in source_ledgers(report.manifest)] == [
        files["c"],
        "questions",
        str(raw),
    ]
    alone = build(
        str(qa),
        tokenizer=tokenizer_dir,
        output=tmp_path / "q",
        map="question=prompt,answer=completion",
        max_length=64,
    )
    assert all(text in texts(report.folder) for text in texts(alone.folder))
    all_trained = run([{**sources[1], "train_on": "all"}], tokenizer_dir, tmp_path / "all").manifest
    assert all_trained.trained_tokens > alone.manifest.trained_tokens


def test_the_bytes_do_not_depend_on_workers(files, tokenizer_dir, tmp_path, monkeypatch):
    from sftprep.sources import groups

    monkeypatch.setattr(groups, "PARTITION_BYTES", 300)
    sources = [
        {"path": files["a"], "repeat": 1.5, "limit": 33},
        {"path": files["b"], "weight": None, "repeat": 0.7},
        {"path": files["c"], "train_on": "all"},
    ]
    more = {"eval_fraction": 0.2, "eval_packing": "none", "shard_tokens": 200}
    one, two = (run(sources, tokenizer_dir, tmp_path / f"w{w}", workers=w, **more) for w in (1, 2))
    assert len(one.manifest.shards) > 2
    assert content(one.folder) == content(two.folder)
    check_accounting(one.folder)
    check_accounting(one.folder / "eval")


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    repeats=st.lists(st.floats(0.05, 3), min_size=3, max_size=3),
    weights=st.none() | st.lists(st.floats(0.1, 10), min_size=3, max_size=3),
    limits=st.lists(st.none() | st.integers(1, 50), min_size=3, max_size=3),
    fraction=st.sampled_from([0.0, 0.0, 0.3]),
)
def test_every_record_is_accounted_for(
    files, tokenizer_dir, tmp_path_factory, repeats, weights, limits, fraction
):
    sources = [
        {"path": files[name], "repeat": repeat, "limit": limit, "weight": weights and weights[n]}
        for n, (name, repeat, limit) in enumerate(zip("abc", repeats, limits, strict=True))
    ]
    output = tmp_path_factory.mktemp("o")
    try:
        report = run(sources, tokenizer_dir, output / "o", eval_fraction=fraction, eval_seed=3)
    except EmptyInput:
        return
    by_source(report)
    for name, limit, size in zip("abc", limits, (40, 30, 10), strict=True):
        accounts = dict(source_ledgers(report.manifest))[files[name]]
        assert accounts.records == min(limit or size, size)
        if weights is None:
            left = accounts.records - accounts.left_out.get("held_out", 0)
            assert accounts.sequences == round(repeats["abc".index(name)] * left)
    if fraction:
        check_accounting(report.folder / "eval")
        assert not set(origins(report.folder)) & set(origins(report.folder / "eval"))


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_is_built_by_any_number_of_workers(
    tokenizer_dir, tmp_path, monkeypatch, name
):
    from sftprep.sources import groups

    monkeypatch.setattr(groups, "PARTITION_BYTES", 600)
    rows = [{"text": f"row {k} " + "word " * (k % 9)} for k in range(60)]
    path = str(tmp_path / name)
    WRITERS[name](rows, path)
    builds = [
        build(path, tokenizer=tokenizer_dir, output=tmp_path / f"o{w}", workers=w, max_length=64)
        for w in (1, 2)
    ]
    assert content(builds[0].folder) == content(builds[1].folder)
    located = map(builds[0].manifest.locate, origins(builds[0].folder))
    assert sorted(located) == [(path, line) for line in range(1, 61)]


def test_impossible_settings_of_sources_are_rejected(files, tokenizer_dir, tmp_path):
    path = {"path": "a.jsonl"}
    cases = [
        ([{**path, "wieght": 2}], r"unknown setting 'wieght' of a source[\s\S]*'weight'"),
        ([{**path, "weight": 1}, {"path": "b.jsonl"}], "b.jsonl has no weight"),
        ([{**path, "weight": 0}], "weight of a.jsonl is 0"),
        ([{**path, "repeat": -1}], "repeat of a.jsonl is -1"),
        ([{**path, "limit": 0}], "limit of a.jsonl is 0"),
        ([{"weight": 1}], "names no input"),
        ([5], "a source is 5"),
        ("a.jsonl", "write a list"),
    ]
    for sources, message in cases:
        with pytest.raises(ConfigError, match=message):
            BuildConfig.of(sources=sources)
    with pytest.raises(ConfigError, match="both given"):
        BuildConfig.of(sources=["a"], inputs=["b"])
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(EmptyInput, match=r"empty\.jsonl has a weight"):
        run(
            [{"path": str(empty), "weight": 1}, {"path": files["a"], "weight": 1}],
            tokenizer_dir,
            tmp_path / "o",
        )
    with pytest.raises(ConfigError, match="named twice"):
        run([files["a"], {"path": files["a"], "limit": 3}], tokenizer_dir, tmp_path / "o")


def test_a_mixture_in_a_config_file_is_reported_by_source(files, tokenizer_dir, tmp_path, capsys):
    config = tmp_path / "mix.yaml"
    config.write_text(
        f"sources:\n  - path: {files['a']}\n    repeat: 2\n  - path: {files['c']}\n    limit: 4\n"
        f"tokenizer: {tokenizer_dir}\nmax-length: 64\neval_fraction: 0.2\n"
    )
    with pytest.raises(SystemExit) as caught:
        main(["build", "--config", str(config), "--output", str(tmp_path / "o"), "--json"])
    assert caught.value.code == 0
    summary = json.loads(capsys.readouterr().out)
    first, second = summary["sources"]
    assert (first["source"], second["source"]) == (files["a"], files["c"])
    assert (
        first["accounting"]["extra"]["repeated"] + first["accounting"]["left_out"]["held_out"] == 40
    )
    assert second["accounting"]["records"] == 4
    assert summary["evaluation"]["accounting"]["sequences"] == sum(
        s["accounting"]["left_out"].get("held_out", 0) for s in summary["sources"]
    )
    command = ["build", "--config", str(config), "--output", str(tmp_path / "o")]
    with pytest.raises(SystemExit):
        main([*command, "--overwrite", "--seed", "1"])
    printed = capsys.readouterr().out
    assert "(limit 4: the rest was not read)" in printed
    assert f"{files['a']}\n  records 40 + repeated " in printed
    assert "held out" in printed
    assert "evaluation: " in printed
    assert read_manifest(tmp_path / "o").config["sources"][0]["repeat"] == 2


def test_sources_of_the_same_name_have_separate_accounting(files, tokenizer_dir, tmp_path):
    report = run(
        [{"path": files[name], "name": "same"} for name in "ab"], tokenizer_dir, tmp_path / "o"
    )
    check_accounting(report.folder)
    assert [(name, own.records) for name, own in source_ledgers(report.manifest)] == [
        ("same", 40),
        ("same (2)", 30),
    ]


def test_the_default_name_of_an_entry_is_its_inputs():
    assert SourceEntry.of("a.jsonl").name == "a.jsonl"
    assert SourceEntry.of({"inputs": ["a", "b"]}).name == "a, b"
