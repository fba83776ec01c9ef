"""Sequences that are too long: how they are cut, and that every token is accounted for."""

from __future__ import annotations

from collections import Counter
from itertools import zip_longest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftprep import BuildConfig, build, open_shards, verify
from sftprep.core.mask_arrays import find_targets
from sftprep.core.types import TokenBatch
from sftprep.errors import ConfigError, RecordError
from sftprep.packing import plan_counts
from sftprep.pipeline.passes.overlong import OVERLONG, LengthLimit, fit_lengths
from sftprep.pipeline.passes.sequence_stats import (
    count_exact_lengths,
    count_lengths,
    count_trained_positions,
    describe_lengths,
    length_bounds,
    sum_exact_counts,
)
from sftprep.shards.manifest_size import MOST_EXACT_LENGTHS
from tests.semantics.prepared import prepare

SEQUENCES = st.lists(st.lists(st.booleans(), max_size=12), max_size=8)


def batch_of(masks):
    lengths = [len(mask) for mask in masks]
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    flat = np.array([x for mask in masks for x in mask], dtype=np.bool_)
    ids = np.arange(len(flat), dtype=np.int32)
    line_of = np.arange(len(masks), dtype=np.int64) // 2
    return TokenBatch(ids, offsets, flat, line_of, loss_weights=flat.astype(np.float32) / 2)


def as_lists(batch):
    return [
        (batch.input_ids[a:b].tolist(), batch.completion_mask[a:b].tolist(), int(line))
        for a, b, line in zip(batch.offsets[:-1], batch.offsets[1:], batch.line_of, strict=True)
    ]


def slow(masks, overlong, limit, side):
    """Return (ids, mask, line) of each sequence by definition, and lines of rejected records."""
    kept, rejected, at = [], set(), 0
    for number, mask in enumerate(masks):
        ids, line = list(range(at, at + len(mask))), number // 2
        at += len(mask)
        pieces = [(ids, mask, line)]
        if len(ids) > limit:
            if overlong == "truncate":
                pieces = [
                    (ids[:limit], mask[:limit], line)
                    if side == "right"
                    else (ids[-limit:], mask[-limit:], line)
                ]
            elif overlong == "split":
                pieces = [
                    (ids[k : k + limit], mask[k : k + limit], line)
                    for k in range(0, len(ids), limit)
                ]
            else:
                pieces = []
                if overlong == "error":
                    rejected.add(line)
        kept += pieces
    return [piece for piece in kept if piece[2] not in rejected], rejected


@given(
    SEQUENCES,
    st.sampled_from([*OVERLONG, "keep"]),
    st.integers(1, 6),
    st.sampled_from(["right", "left"]),
)
def test_each_overlong_setting_matches_its_definition_and_counts_balance(
    masks, overlong, limit, side
):
    batch = batch_of(masks)
    targets = find_targets(batch.completion_mask, batch.offsets)
    length_limit = LengthLimit(max_length=limit, overlong=overlong, truncate_side=side)
    fitted = fit_lengths(batch, targets, b"{}\n" * len(masks), length_limit)
    ranges, counts = fitted.ranges, Counter(fitted.counts)
    expected, lines = slow(masks, overlong, 10**9 if overlong == "keep" else limit, side)
    trained = [piece for piece in expected if any(piece[1][1:])]
    left = batch.gather(ranges.rows, ranges.lengths, ranges.starts)
    assert as_lists(left) == trained
    assert left.loss_weights.tolist() == (left.completion_mask / 2).tolist()
    assert [r.line for r in fitted.rejected] == sorted(lines)
    assert {r.excerpt for r in fitted.rejected} <= {"{}"}
    # Sequences, tokens and targets: what comes in is what is kept, and what is counted as lost.
    assert fitted.targets.tolist() == [sum(mask[1:]) for _, mask, _ in trained]
    assert counts["trained_tokens"] == fitted.targets.sum()
    dropped = sum(n for key, n in counts.items() if key.startswith("dropped."))
    assert len(masks) + counts["extra.split"] == counts["sequences"] + len(lines) + dropped
    for what in ("tokens", "trained"):
        lost = sum(n for key, n in counts.items() if key.startswith(f"{what}_dropped."))
        kept = counts["tokens" if what == "tokens" else "trained_tokens"]
        assert counts[f"{what}_in"] == kept + counts[f"{what}_truncated"] + lost
    assert counts["trained_in"] == sum(sum(mask[1:]) for mask in masks)
    kept_ids = {token for ids, _, _ in expected for token in ids}
    cut_targets = set()
    for first, mask in zip(batch.offsets.tolist(), masks, strict=False):
        at = {first + k for k in range(1, len(mask)) if mask[k]}
        cut_targets |= at - kept_ids
    lost_targets = counts["trained_truncated"] + counts["trained_dropped.overlong"]
    assert lost_targets == len(cut_targets)


@given(
    SEQUENCES,
    st.sampled_from([*OVERLONG, "keep"]),
    st.integers(1, 90),
    st.sampled_from(["right", "left"]),
    st.integers(1, 40),
)
def test_the_histogram_says_what_each_length_would_keep(masks, overlong, limit, side, factor):
    """Compare it with the cut at each of its lengths."""
    masks = [mask * factor for mask in masks]
    batch = batch_of(masks)
    targets = find_targets(batch.completion_mask, batch.offsets)
    rule = LengthLimit(max_length=limit, overlong=overlong, truncate_side=side)
    counted = count_lengths(batch, targets, rule)
    exact = sum_exact_counts(
        [count_exact_lengths(batch, rule), np.zeros(0, np.int64)],
        [np.zeros(0, np.int64), count_trained_positions(batch, targets)],
    )
    histogram = describe_lengths([counted, counted[:, :0]], exact, rule)
    found = dict(zip(exact["lengths"], exact["sequences"], strict=True))
    assert found == Counter(len(mask) for mask in masks if len(mask) <= limit)
    assert sum(histogram["sequences"]) == len(masks)
    assert sum(histogram["tokens"]) == batch.offsets[-1]
    assert sum(histogram["trained_tokens"]) == targets.total
    positions = Counter(k // 64 for mask in masks for k in range(1, len(mask)) if mask[k])
    longest = max(positions, default=-1)
    assert exact["trained_positions"] == [positions[k] for k in range(longest + 1)]
    # Whatever is not dropped or rejected is measured as if it were truncated.
    measured = overlong if overlong in ("drop", "error") else "truncate"
    kept = np.cumsum(counted, axis=1)
    for column, length in enumerate(length_bounds(rule)[: counted.shape[1]].tolist()):
        expected, _ = slow(masks, measured, length, side)
        assert kept[0, column] == sum(len(mask) <= length for mask in masks)
        assert kept[1, column] == sum(len(ids) for ids, _, _ in expected)
        assert kept[2, column] == sum(sum(mask[1:]) for _, mask, _ in expected)


def test_truncate_side_selects_the_end_that_is_cut(tokenizer_dir):
    row = {"text": "one two three four five six seven eight nine ten eleven twelve"}
    whole = prepare([row], tokenizer_dir).batch.input_ids.tolist()
    for side, expected in (("right", whole[:6]), ("left", whole[-6:])):
        made = prepare([row], tokenizer_dir, max_length=6, truncate_side=side)
        assert made.batch.input_ids.tolist() == expected
        assert made.batch.counts["tokens_truncated"] == len(whole) - 6


def test_a_prompt_that_fills_the_sequence_leaves_nothing_to_train(tokenizer_dir):
    row = {"prompt": "one two three four five six seven eight", "completion": "nine"}
    made = prepare([row], tokenizer_dir, max_length=6)
    assert (len(made), made.batch.counts["dropped.no_trained_token"]) == (0, 1)
    assert prepare([row], tokenizer_dir, max_length=6, truncate_side="left").trained() != []


def built(records, tokenizer_dir, tmp_path, rows, name="out", **settings):
    config = BuildConfig.of(
        inputs=records(rows), tokenizer=str(tokenizer_dir), output=str(tmp_path / name), **settings
    )
    return build(config), open_shards(tmp_path / name)


TEXTS = [{"text": " ".join(f"w{k}" for k in range(n))} for n in (3, 30, 1, 12, 7, 55, 2)]


def test_the_plan_of_a_build_follows_from_its_manifest(records, tokenizer_dir, tmp_path):
    """Truncated sequences have the largest length."""
    report, _ = built(records, tokenizer_dir, tmp_path, TEXTS * 9, max_length=50)
    lengths = report.manifest.lengths
    exact = lengths["exact"]
    counts = Counter(dict(zip(exact["lengths"], exact["sequences"], strict=True)))
    counts[50] += sum(lengths["sequences"]) - counts.total()
    plan = plan_counts((sorted(counts), [counts[n] for n in sorted(counts)]), 50)
    assert (plan.num_bins, plan.tokens) == (report.manifest.rows, report.manifest.tokens)


def test_what_another_length_keeps_follows_from_the_manifest(records, tokenizer_dir, tmp_path):
    """Also where it is longer than that of the build, and over several groups."""
    rows = [{"text": " ".join(f"w{k}" for k in range(n))} for n in (3, 100, 150, 40, 290) * 9]
    settings = {"group_bytes": 1 << 16, "workers": 1}
    report, _ = built(records, tokenizer_dir, tmp_path, rows * 9, max_length=100, **settings)
    manifest = report.manifest
    assert len(manifest.groups) > 1
    counts = manifest.lengths["exact"]["trained_positions"]
    assert sum(counts) == manifest.accounting.trained_in
    longer, _ = built(records, tokenizer_dir, tmp_path, rows * 9, "longer", max_length=192)
    assert sum(counts[:3]) == longer.manifest.trained_tokens < sum(counts)


def test_positions_beyond_the_longest_counted_one_are_left_out():
    batch = batch_of([[True] * (MOST_EXACT_LENGTHS + 100), [True] * 3])
    counts = count_trained_positions(batch, find_targets(batch.completion_mask, batch.offsets))
    assert counts.tolist() == [65, *[64] * (MOST_EXACT_LENGTHS // 64 - 1)]


def test_lengths_are_counted_by_source(records, tokenizer_dir, tmp_path):
    sources = [
        {"name": name, "inputs": [records(TEXTS[:n], f"{name}.jsonl")]}
        for name, n in (("a", 3), ("b", 5))
    ]
    config = BuildConfig.of(
        sources=sources, tokenizer=str(tokenizer_dir), output=str(tmp_path / "o"), max_length=90
    )
    manifest = build(config).manifest
    group = manifest.read_group(0)
    found = {name: sum(each["sequences"]) for name, each in group.source_lengths.items()}
    assert found == {"a": 3, "b": 5}
    assert sum(group.lengths["exact"]["sequences"]) == 8
    by_position = [each["trained_positions"] for each in group.source_lengths.values()]
    sums = [sum(counts) for counts in zip_longest(*by_position, fillvalue=0)]
    assert group.lengths["exact"]["trained_positions"] == sums
    assert [sum(counts) for counts in by_position] == [
        source.trained_tokens for source in manifest.sources
    ]
    assert verify(tmp_path / "o").problems == []


def test_wrapped_packs_are_one_stream(records, tokenizer_dir, tmp_path):
    whole = prepare(TEXTS, tokenizer_dir, max_length=100_000)
    report, shards = built(
        records, tokenizer_dir, tmp_path, TEXTS, packing="wrapped", max_length=16, order="keep"
    )
    stream = np.concatenate([pack.input_ids for pack in shards])
    assert stream.tolist() == whole.batch.input_ids.tolist()
    assert {len(pack.input_ids) for pack in list(shards)[:-1]} == {16}
    starts = set(whole.batch.offsets[:-1].tolist())
    at = 0
    for pack in shards:
        for length, origin in zip(pack.seq_lengths.tolist(), pack.origin.tolist(), strict=True):
            assert (
                at in starts or at % 16 == 0
            )  # positions restart at documents, and where a row starts
            assert whole.batch.offsets[origin] <= at < whole.batch.offsets[origin + 1]
            at += length
        assert (pack.position_ids == 0).sum() == len(pack.seq_lengths)
    accounts = report.manifest.accounting
    assert accounts.check() == []
    assert report.manifest.plan["cuts"] == sum(len(pack.seq_lengths) for pack in shards) - len(
        TEXTS
    )
    assert verify(tmp_path / "out").problems == []


@pytest.mark.parametrize("settings", [{"packing": "bfd_split"}, {"overlong": "split"}])
def test_split_keeps_every_token_except_an_unpredicted_last_one(
    records, tokenizer_dir, tmp_path, settings
):
    report, shards = built(records, tokenizer_dir, tmp_path, TEXTS, max_length=16, **settings)
    whole = prepare(TEXTS, tokenizer_dir, max_length=100_000)
    lonely = sum(n > 16 and n % 16 == 1 for n in whole.batch.lengths.tolist())
    assert sum(len(pack.input_ids) for pack in shards) == len(whole.batch.input_ids) - lonely
    assert report.manifest.accounting.dropped.get("no_trained_token", 0) == lonely
    assert report.manifest.accounting.extra["split"] == sum(
        -(-n // 16) - 1 for n in whole.batch.lengths.tolist()
    )
    assert verify(tmp_path / "out").problems == []


def test_overlong_records_can_be_errors(records, tokenizer_dir, tmp_path):
    with pytest.raises(RecordError, match=r"data.jsonl:2.*than max_length \(16\) \[overlong\]"):
        built(records, tokenizer_dir, tmp_path, TEXTS, max_length=16, overlong="error")
    settings = {
        "max_length": 16,
        "overlong": "error",
        "on_bad_record": "quarantine",
        "max_rejected": "100%",
    }
    report, _ = built(records, tokenizer_dir, tmp_path, TEXTS, "other", **settings)
    assert report.manifest.accounting.rejected == {"overlong": 3}
    report, _ = built(
        records, tokenizer_dir, tmp_path, TEXTS, "third", max_length=16, overlong="drop"
    )
    assert report.manifest.accounting.dropped["overlong"] == 3
    assert report.manifest.accounting.check() == []


def test_loss_weights_reach_the_shards(records, tokenizer_dir, tmp_path):
    talk = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two.", "loss_weight": 0.5},
    ]
    rows = [
        {"messages": talk},
        {"messages": [{**m, "loss_weight": 1.0} for m in talk[:1]] + [talk[1]]},
    ]
    _, shards = built(records, tokenizer_dir, tmp_path, rows, max_length=64)
    weights = np.concatenate([pack.loss_weights for pack in shards])
    mask = np.concatenate([pack.completion_mask for pack in shards])
    assert ((weights > 0) == mask).all()
    assert set(weights.tolist()) == {0.0, 0.5, 1.0}
    assert verify(tmp_path / "out").problems == []
    unweighed = [{"messages": [talk[0], {"role": "assistant", "content": "a"}]}] * 9
    many = BuildConfig.of(
        inputs=[records(rows, "a.jsonl"), records(unweighed, "b.jsonl")],
        tokenizer=str(tokenizer_dir), output=str(tmp_path / "many"), max_length=32, shard_tokens=32,
    )  # fmt: skip
    assert len(build(many).manifest.shards) > 2
    assert all(pack.loss_weights is not None for pack in open_shards(tmp_path / "many"))
    assert verify(tmp_path / "many").problems == []
    _, plain = built(
        records,
        tokenizer_dir,
        tmp_path,
        [{"messages": [talk[0], {"role": "assistant", "content": "a"}]}],
        "plain",
    )
    assert plain[0].loss_weights is None
    import datasets

    datasets.disable_progress_bars()
    table = datasets.load_dataset(
        "arrow",
        data_files=str(tmp_path / "out" / "shards" / "*" / "*.arrow"),
        cache_dir=str(tmp_path / "c"),
    )
    assert table["train"].features["loss_weights"].feature.dtype == "float32"


@pytest.mark.parametrize("settings", [{"overlong": "drop"}, {"pack_window": 4}])
def test_wrapped_rejects_settings_that_it_does_not_use(settings):
    with pytest.raises(ConfigError, match="wrapped"):
        BuildConfig.of(packing="wrapped", **settings)
