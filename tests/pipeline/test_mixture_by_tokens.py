"""The weights of a mixture count records, tokens or trained tokens: exactly, and whatever the
groups and the workers are."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftprep import BuildConfig, BuildReport, build, open_shards, preview, read_manifest
from sftprep.cli import main
from sftprep.config.data import SourceEntry
from sftprep.errors import ConfigError, EmptyInput
from sftprep.pipeline.mixture.quotas import Quota, share_sizes
from sftprep.pipeline.mixture.sized_records import SizedRecords, is_sizes_file
from tests.pipeline.builds import check_accounting, content, texts
from tests.pipeline.group_inputs import GROUP_BYTES, spy_on_reads, texts_of, write

MEASURES = ("tokens", "trained_tokens")


# --- the quotas -----------------------------------------------------------------------------------


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[list[SourceEntry], list[SizedRecords]]:
    """Sources with weights, and the usable records of each in one to four groups."""
    num_sources, num_groups = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    weight = st.sampled_from([1e-6, 0.3, 1.0, 3.0, 1e6]) | st.floats(1e-6, 1e6)
    repeat = st.sampled_from([1.0, 1.0, 0.5, 1.5, 3.0])
    entries = [
        SourceEntry((f"{k}.jsonl",), weight=draw(weight), repeat=draw(repeat))
        for k in range(num_sources)
    ]
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    largest = draw(st.sampled_from([1, 9, 100_000, 2**40]))
    groups = []
    for _ in range(num_groups):
        counts = np.array([draw(st.integers(0, 40)) for _ in entries])
        # Equal keys are the positions that groups have in common.
        keys = [np.sort(rng.integers(0, draw(st.sampled_from([3, 2**63])), n)) for n in counts]
        sizes = rng.integers(1, largest, counts.sum(), endpoint=True)
        groups.append(SizedRecords(counts, np.concatenate(keys).astype(np.uint64), sizes))
    return entries, groups


def take(records: SizedRecords, source: int, quota: Quota) -> tuple[int, int]:
    """Return the size of what a quota takes of a source, and the size of its largest record."""
    start = int(records.starts[source])
    sizes = records.sizes[start : start + int(records.counts[source])]
    assert 0 <= quota.extra <= len(sizes)
    assert quota.copies >= 0
    taken = quota.copies * int(sizes.sum()) + int(sizes[: quota.extra].sum())
    return taken, int(sizes.max(initial=0))


@given(mixtures())
def test_each_source_is_half_a_record_from_its_target_at_most(
    mixture: tuple[list[SourceEntry], list[SizedRecords]],
) -> None:
    entries, groups = mixture
    totals = [sum(take(group, k, Quota(1, 0))[0] for group in groups) for k in range(len(entries))]
    readers = [partial(lambda group: group, group) for group in groups]
    if 0 in totals:
        with pytest.raises(EmptyInput, match=r"\.jsonl has a weight, but no usable record"):
            share_sizes(entries, readers)
        return
    quotas = share_sizes(entries, readers)
    units = [t * e.repeat / e.weight for t, e in zip(totals, entries, strict=True) if e.weight]
    for k, entry in enumerate(entries):
        taken, largest = 0, 0
        for group, of_group in zip(groups, quotas, strict=True):
            of_source, most = take(group, k, of_group[k])
            taken, largest = taken + of_source, max(largest, most)
        target = min(units) * (entry.weight or 0)
        assert abs(taken - target) <= largest / 2 + 1e-9 * target
        if units[k] == min(units) and entry.repeat == int(entry.repeat):
            assert taken == entry.repeat * totals[k]


@given(mixtures(), st.data())
def test_the_chosen_sizes_do_not_depend_on_the_groups(
    mixture: tuple[list[SourceEntry], list[SizedRecords]], data: st.DataObject
) -> None:
    entries, groups = mixture
    if any(sum(int(group.counts[k]) for group in groups) == 0 for k in range(len(entries))):
        return
    keys, sizes, counts = [], [], []
    for k in range(len(entries)):
        ranges = [slice(int(g.starts[k]), int(g.starts[k] + g.counts[k])) for g in groups]
        of_source = np.concatenate([g.keys[r] for g, r in zip(groups, ranges, strict=True)])
        order = np.argsort(of_source, kind="stable")
        keys.append(of_source[order])
        of_source = np.concatenate([g.sizes[r] for g, r in zip(groups, ranges, strict=True)])
        sizes.append(of_source[order])
        counts.append(len(order))
    joined = SizedRecords(np.array(counts), np.concatenate(keys), np.concatenate(sizes))
    (one,) = share_sizes(entries, [lambda: joined])
    many = share_sizes(entries, [partial(lambda group: group, group) for group in groups])
    for k, quota in enumerate(one):
        assert {of_group[k].copies for of_group in many} == {quota.copies}
        assert sum(of_group[k].extra for of_group in many) == quota.extra
        found = sum(take(group, k, q[k])[0] for group, q in zip(groups, many, strict=True))
        assert found == take(joined, k, quota)[0]


def test_records_are_read_from_the_file_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "sizes.npy"
    keys = np.array([5, 2**64 - 1, 0], np.uint64)
    records = SizedRecords(np.array([2, 0, 1]), keys, np.array([7, 8, 9]))
    records.write(path)
    found = SizedRecords.read(path)
    for name in ("counts", "keys", "sizes"):
        assert np.array_equal(getattr(found, name), getattr(records, name))
    assert is_sizes_file(path, 3)
    assert not is_sizes_file(path, 2)
    path.write_bytes(path.read_bytes()[:-8])
    assert not is_sizes_file(path, 3)
    assert not is_sizes_file(tmp_path / "missing", 3)


# --- builds ---------------------------------------------------------------------------------------


@pytest.fixture
def run(tokenizer_dir: Path, tmp_path: Path) -> Callable[..., BuildReport]:
    """A function that builds into a folder of a name."""

    def run_build(name: str, **more: Any) -> BuildReport:
        more = {"max_length": 64, "workers": 1, "group_bytes": GROUP_BYTES} | more
        report = build(tokenizer=tokenizer_dir, output=tmp_path / name, **more)
        check_accounting(report.folder)
        return report

    return run_build


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A function that runs a command, and returns what it printed to stdout."""

    def run_command(*words: str) -> str:
        with pytest.raises(SystemExit) as caught:
            main([*words])
        assert caught.value.code == 0
        return capsys.readouterr().out

    return run_command


@pytest.fixture
def sources(tmp_path: Path) -> list[dict[str, Any]]:
    """Three sources of several groups, with the weights 3, 1 and 1: of long, of medium, and of
    short records; some of the first are cut."""
    rng = random.Random(0)
    rows = {
        "long": [{"text": "word " * rng.randint(40, 90)} for _ in range(400)],
        "medium": texts_of(700, 2, "m"),
        "short": [{"prompt": f"{k}?", "completion": "z " * rng.randint(1, 9)} for k in range(3000)],
    }
    return [
        {"path": write(tmp_path / f"{name}.jsonl", rows[name]), "name": name, "weight": weight}
        for name, weight in zip(rows, (3, 1, 1), strict=True)
    ]


@pytest.mark.parametrize("mix_by", MEASURES)
def test_the_shares_are_those_of_what_the_packs_contain(
    run: Any, sources: Any, mix_by: str
) -> None:
    report = run("o", sources=sources, mix_by=mix_by)
    assert len(report.manifest.groups) > 4
    found = {source.name: getattr(source, mix_by) for source in report.manifest.sources}
    target = found["long"] / 3
    # No record has more than 64 tokens after the cut.
    assert abs(found["medium"] - target) <= 32
    assert abs(found["short"] - target) <= 32
    # The source with the least for its weight is complete.
    assert report.manifest.sources[0].sequences == 400
    shares = [source.shares[mix_by] for source in report.manifest.sources]
    assert shares == pytest.approx([60, 20, 20], abs=0.1)
    packed = Counter[str]()
    shards = open_shards(report.folder)
    for index, pack in enumerate(shards):
        for number, length in enumerate(pack.seq_lengths.tolist()):
            packed[Path(shards.locate(index, number)[0]).stem] += length
    assert packed == {source.name: source.tokens for source in report.manifest.sources}


def test_nothing_is_tokenized_twice_and_no_worker_changes_a_byte(run: Any, sources: Any) -> None:
    one = run("one", sources=sources, mix_by="tokens")
    partitions = sum(len(i.slices) for g in one.manifest.read_groups() for i in g.inputs)
    assert one.reused == partitions
    two = run("two", sources=sources, mix_by="tokens", workers=2)
    assert content(two.folder) == content(one.folder)


def test_the_tokens_chosen_do_not_depend_on_the_size_of_the_groups(run: Any, sources: Any) -> None:
    many = run("many", sources=sources, mix_by="tokens")
    whole = run("whole", sources=sources, mix_by="tokens", group_bytes=1 << 30)
    assert len(whole.manifest.groups) == 1
    for one, other in zip(many.manifest.sources, whole.manifest.sources, strict=True):
        assert abs(one.tokens - other.tokens) <= 64


def test_parts_take_another_round_and_give_the_same_build(
    run: Any, sources: Any, tokenizer_dir: Path, tmp_path: Path
) -> None:
    more = {"sources": sources, "mix_by": "tokens", "max_length": 64, "workers": 1}
    more |= {"group_bytes": GROUP_BYTES, "tokenizer": tokenizer_dir, "output": tmp_path / "parts"}
    first = [build(part=f"{k}/2", **more) for k in (1, 2)]
    assert first[0].waiting_for == (2,)
    again = [build(part=f"{k}/2", **more) for k in (1, 2)]
    assert again[1].groups_done == again[1].groups_total
    build(**more)
    alone = run("alone", sources=sources, mix_by="tokens")
    assert content(tmp_path / "parts") == content(alone.folder)


def test_a_later_build_with_other_weights_reads_the_sizes_of_the_earlier_one(
    run: Any, sources: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("o", sources=sources, mix_by="tokens", keep_spill=True)
    read = spy_on_reads(monkeypatch)
    same = run("o", sources=sources, mix_by="tokens", overwrite=True, keep_spill=True)
    assert read == []
    other = [{**source, "weight": 1} for source in sources]
    changed = run("o", sources=other, mix_by="tokens", overwrite=True, keep_spill=True)
    assert changed.reused == sum(
        len(i.slices) for g in changed.manifest.read_groups() for i in g.inputs
    )
    tokens = [source.tokens for source in changed.manifest.sources]
    assert max(tokens) - min(tokens) <= 64
    assert same.manifest.data_digest != changed.manifest.data_digest


@settings(max_examples=10, deadline=None)
@given(
    weights=st.lists(st.sampled_from([1e-6, 0.01, 1.0, 3.0, 50.0]), min_size=1, max_size=3),
    mix_by=st.sampled_from(MEASURES),
    overlong=st.sampled_from(["truncate", "split", "drop"]),
    repeat=st.sampled_from([1, 2.5]),
    layout=st.sampled_from(["packs", "sequences"]),
    fraction=st.sampled_from([0.0, 0.2]),
)
def test_a_mixture_of_any_settings_is_half_a_record_from_its_shares(
    tokenizer_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
    weights: list[float],
    mix_by: str,
    overlong: str,
    repeat: float,
    layout: str,
    fraction: float,
) -> None:
    folder = tmp_path_factory.mktemp("o")
    sources = [
        {
            "path": write(folder / f"{k}.jsonl", texts_of(30, k, f"{k}") + texts_of(8, k, f"{k}")),
            "weight": weight,
            "repeat": repeat,
        }
        for k, weight in enumerate(weights)
    ]
    report = build(
        sources=sources,
        tokenizer=tokenizer_dir,
        output=folder / "o",
        max_length=48,
        workers=1,
        **{"mix_by": mix_by, "overlong": overlong, "layout": layout, "duplicates": "drop"},
        eval_fraction=fraction,
        eval_seed=1,
    )
    if layout == "packs":  # otherwise a repeated sequence is stored once
        check_accounting(report.folder)
    amounts = [getattr(source, mix_by) for source in report.manifest.sources]
    # The targets of the sources relative to their weights are equal.
    largest = 48 if overlong != "split" and layout == "packs" else 160
    low = max((a - largest / 2) / w for a, w in zip(amounts, weights, strict=True))
    high = min((a + largest / 2) / w for a, w in zip(amounts, weights, strict=True))
    assert low <= high * (1 + 1e-9)


def test_records_that_are_rejected_or_dropped_do_not_count(run: Any, tmp_path: Path) -> None:
    rows = texts_of(200, 1, "a")
    bad = [row for pair in zip(rows, ["{", "[]"] * 100, strict=True) for row in pair]
    sources = [
        {"path": write(tmp_path / "a.jsonl", bad), "name": "a", "weight": 1},
        {"path": write(tmp_path / "b.jsonl", texts_of(300, 2, "b")), "name": "b", "weight": 1},
    ]
    more = {"on_bad_record": "quarantine", "max_rejected": "100%", "mix_by": "tokens"}
    report = run("o", sources=sources, **more)
    first, second = report.manifest.sources
    assert first.sequences == 200
    assert abs(first.tokens - second.tokens) <= 32
    for name, rows in (("bad", ["{", "[]"]), ("empty", [])):
        unusable = {**sources[0], "path": write(tmp_path / f"{name}.jsonl", rows)}
        with pytest.raises(EmptyInput, match="the source a has a weight, but no usable record"):
            run("o2", sources=[unusable, sources[1]], **more)


def test_evaluation_splits_of_weighted_sources_are_used_once(
    run: Any, tmp_path: Path, tokenizer_dir: Path
) -> None:
    sources = []
    for name, count in (("a", 60), ("b", 90)):
        splits = {
            "train": datasets.Dataset.from_list(texts_of(count, 1, name)),
            "test": datasets.Dataset.from_list(texts_of(7, 2, name)),
        }
        datasets.DatasetDict(splits).save_to_disk(str(tmp_path / name))
        sources.append({"path": str(tmp_path / name), "name": name, "weight": 1, "repeat": 2})
    for mix_by in ("records", "tokens"):
        report = run(mix_by, sources=sources, eval_split="test", mix_by=mix_by)
        assert report.evaluation.accounting.sequences == 14


def test_mix_by_without_weights_is_an_error(
    run: Any, sources: Any, tokenizer_dir: Path, tmp_path: Path
) -> None:
    plain = [source["path"] for source in sources]
    with pytest.raises(ConfigError, match='mix_by="tokens" is specified, but no source has'):
        run("o", inputs=plain, mix_by="tokens")
    with pytest.raises(ConfigError, match="mix_by is 'token'"):
        BuildConfig.of(sources=sources, mix_by="token")
    assert preview(sources=sources, tokenizer=tokenizer_dir, mix_by="tokens").records


def test_the_summary_has_the_shares_in_percent(
    run: Any, sources: Any, tokenizer_dir: Path, tmp_path: Path, command: Any
) -> None:
    config = tmp_path / "mix.yaml"
    config.write_text(
        json.dumps({"sources": sources, "tokenizer": str(tokenizer_dir), "max-length": 64})
    )
    base = ["build", "--config", str(config), "--output", str(tmp_path / "o")]
    printed = command(*base, "--mix-by", "tokens")
    assert "share in %  sequences   tokens  trained tokens   weight (by tokens)" in printed
    assert "long" in printed.partition("share in %")[2]
    values = json.loads(command(*base, "--overwrite", "--mix-by", "trained_tokens", "--json"))
    assert values["mix_by"] == "trained_tokens"
    assert [s["weight"] for s in values["sources"]] == [3, 1, 1]
    shares = [s["shares"]["trained_tokens"] for s in values["sources"]]
    assert shares == pytest.approx([60, 20, 20], abs=0.1)
    manifest = read_manifest(tmp_path / "o")
    assert manifest.config["mix_by"] == "trained_tokens"
    assert [s.shares["trained_tokens"] for s in manifest.sources] == shares
    assert "weight (by trained tokens)" in (tmp_path / "o" / "README.md").read_text()
    assert texts(tmp_path / "o")
