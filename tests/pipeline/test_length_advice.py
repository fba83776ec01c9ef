"""The counts of trained tokens that were cut, recounted from the records; and the warning about a
length that cuts much."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from sftprep import BuildConfig, build, read_manifest, verify
from sftprep.pipeline.build import BuildReport
from sftprep.report.summary import summary_data, summary_lines
from sftprep.shards.length_advice import advise_length
from tests.shards.builds import rewritten


def made(tmp_path: Path, tokenizer: Path, inputs: str, **settings: Any) -> BuildReport:
    output = str(tmp_path / "out")
    config = BuildConfig.of(
        inputs=inputs, tokenizer=str(tokenizer), output=output, overwrite=True, **settings
    )
    report = build(config)
    assert verify(output).problems == []
    return report


def warnings_of(report: BuildReport) -> list[str]:
    return [line for line in summary_lines(report) if "--max-length" in line]


PAIRS = [
    {"prompt": "one" + " two three" * (1 + n % 5), "completion": " four five" * (1 + 3 * (n % 7))}
    for n in range(60)
]


def recount(tokenizer_dir: Path) -> list[list[bool]]:
    """Return for each pair which of its tokens are trained, from the tokenizer alone."""
    encode = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json")).encode
    masks = []
    for pair in PAIRS:
        prompt = len(encode(pair["prompt"]).ids)
        whole = len(encode(pair["prompt"] + pair["completion"]).ids) + 1
        masks.append([k >= prompt for k in range(whole)])
    return masks


@pytest.mark.parametrize("side", ["right", "left"])
def test_truncated_tokens_and_trained_ones_among_them_are_those_of_the_records(
    side: str, records: Callable[..., str], tokenizer_dir: Path, tmp_path: Path
) -> None:
    masks = recount(tokenizer_dir)
    report = made(tmp_path, tokenizer_dir, records(PAIRS), max_length=30, truncate_side=side)
    accounting = report.manifest.accounting
    cut = [mask[30:] if side == "right" else mask[: max(0, len(mask) - 30)] for mask in masks]
    assert accounting.tokens_in == sum(map(len, masks))
    assert accounting.trained_in == sum(map(sum, masks))
    assert accounting.tokens_truncated == sum(map(len, cut))
    assert accounting.trained_truncated == sum(map(sum, cut)) > 0
    unpredicted = sum(side == "left" and len(m) > 30 and m[len(m) - 30] for m in masks)
    assert accounting.trained_dropped == ({"first_of_sequence": unpredicted} if unpredicted else {})
    assert accounting.check() == []
    shown = "\n".join(summary_lines(report))
    assert f"{accounting.trained_truncated:,}" in shown
    assert summary_data(report)["accounting"]["trained_truncated"] == sum(map(sum, cut))


def test_dropped_records_are_counted_with_their_trained_tokens(
    records: Callable[..., str], tokenizer_dir: Path, tmp_path: Path
) -> None:
    masks = recount(tokenizer_dir)
    long = [mask for mask in masks if len(mask) > 30]
    settings = {"max_length": 30, "on_bad_record": "quarantine", "max_rejected": "100%"}
    for overlong in ("drop", "error"):
        report = made(tmp_path, tokenizer_dir, records(PAIRS), overlong=overlong, **settings)
        accounting = report.manifest.accounting
        assert accounting.tokens_dropped["overlong"] == sum(map(len, long))
        assert accounting.trained_dropped == {"overlong": sum(map(sum, long))}
        assert accounting.trained_in == sum(map(sum, masks))


def test_repeated_and_held_out_records_balance_in_trained_tokens(
    records: Callable[..., str], tokenizer_dir: Path, tmp_path: Path
) -> None:
    report = made(
        tmp_path, tokenizer_dir, records([*PAIRS, *PAIRS[:20]]), max_length=30,
        duplicates="drop", eval_fraction=0.2,
    )  # fmt: skip
    assert report.evaluation is not None
    for manifest in (report.manifest, report.evaluation):
        accounting = manifest.accounting
        assert accounting.check() == []
        assert accounting.trained_left_out.keys() == accounting.left_out.keys()
        assert accounting.trained_in == sum(manifest.lengths["trained_tokens"])


def test_the_warning_names_the_length_that_keeps_99_percent_of_the_trained_tokens(
    records: Callable[..., str], tokenizer_dir: Path, tmp_path: Path
) -> None:
    long = [{**pair, "completion": pair["completion"] * 8} for pair in PAIRS]
    path = records(long)
    report = made(tmp_path, tokenizer_dir, path, max_length=64)
    (warning,) = warnings_of(report)
    assert warning.startswith("warning: --max-length 64 removed ")
    advice = advise_length(report.manifest)
    assert advice is not None
    assert f"; --max-length {advice.max_length} keeps {100 * advice.keeps:.1f} %" in warning
    assert summary_data(report)["length_advice"]["max_length"] == advice.max_length
    # It keeps what it says, and the next shorter length of the histogram keeps too little.
    total = report.manifest.accounting.trained_in
    advised = made(tmp_path, tokenizer_dir, path, max_length=advice.max_length)
    assert advised.manifest.accounting.trained_truncated == round(total * (1 - advice.keeps))
    assert warnings_of(advised) == []
    shorter = made(tmp_path, tokenizer_dir, path, max_length=advice.max_length - 64)
    assert shorter.manifest.accounting.trained_truncated > 0.01 * total
    # The lengths are those before the cut, whatever it is.
    lengths = [build_.manifest.lengths for build_ in (report, advised)]
    assert sum(lengths[0]["sequences"]) == sum(lengths[1]["sequences"]) == len(long)
    assert sum(lengths[0]["tokens"]) == sum(lengths[1]["tokens"])


def test_the_advised_length_is_at_most_the_limit_of_the_tokenizer(
    records: Callable[..., str], folder_with: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_with("{{ messages[0].content }}")
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_max_length": 100}))
    path = records([*[{"text": "a " * 60}] * 40, {"text": "a " * 190}])
    report = made(tmp_path, folder, path, max_length=50)
    (warning,) = warnings_of(report)
    found = report.manifest.accounting
    lengths = [found.trained_in, found.tokens_in]
    assert lengths[1] - lengths[0] == 41
    one, long = lengths_of(folder, "a " * 60), lengths_of(folder, "a " * 190)
    keeps = (40 * (one - 1) + 99) / (40 * (one - 1) + long - 1)
    assert 0.9 < keeps < 0.99
    assert f"--max-length 100 keeps {int(1000 * keeps) / 10:.1f} % of the trained tokens" in warning
    assert "the tokenizer allows no more" in warning
    # At the limit, there is no other length to name.
    at_limit = made(tmp_path, folder, records([{"text": "a " * 190}]), max_length=100)
    (warning,) = warnings_of(at_limit)
    assert "keeps" not in warning.replace("--overlong split keeps", "")
    assert "--overlong split keeps all tokens" in warning
    split = made(tmp_path, folder, records([{"text": "a " * 190}]), overlong="split")
    assert split.manifest.max_length == 100
    assert warnings_of(split) == []


def lengths_of(folder: Path, text: str) -> int:
    return len(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids) + 1


def test_cut_prompts_are_reported_although_every_trained_token_is_kept(
    records: Callable[..., str], tokenizer_dir: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": "one two three " * 40, "completion": "four"}] * 5
    report = made(tmp_path, tokenizer_dir, records(rows), max_length=40, truncate_side="left")
    (warning,) = warnings_of(report)
    assert "and 0.0 % of the trained tokens" in warning
    assert "--max-length 40 keeps 100.0 % of the trained tokens" in warning


def test_five_percent_may_be_cut_without_a_warning(
    records: Callable[..., str], tokenizer_dir: Path, tmp_path: Path
) -> None:
    rows = [{"text": "a b c d " * 12}] * 99 + [{"text": "a b c d " * 24}]
    report = made(tmp_path, tokenizer_dir, records(rows), max_length=64)
    assert report.manifest.accounting.tokens_truncated > 0
    assert warnings_of(report) == []
    assert summary_data(report)["length_advice"] is None


def test_evaluation_inputs_are_warned_about_separately(
    records: Callable[..., str], tokenizer_dir: Path, tmp_path: Path
) -> None:
    short, long = records([{"text": "a b"}] * 5), records([{"text": "a b c " * 99}], "eval.jsonl")
    report = made(tmp_path, tokenizer_dir, short, eval_input=long, max_length=64)
    (warning,) = warnings_of(report)
    assert warning.startswith("evaluation: warning: --max-length 64 removed ")


def test_verify_finds_a_histogram_that_does_not_fit_the_ledger(
    records: Callable[..., str], tokenizer_dir: Path, tmp_path: Path
) -> None:
    made(tmp_path, tokenizer_dir, records(PAIRS))
    for tokens in ([1, 2], "many", None, [None]):
        rewritten(tmp_path / "out", lambda values: values["lengths"].update(tokens=tokens))  # noqa: B023
        assert any("histogram of lengths" in p for p in verify(tmp_path / "out").problems)
    for positions in ([10**6], "many", None):
        change = {"exact": {"trained_positions": positions}}
        rewritten(tmp_path / "out", lambda values: values["lengths"].update(change))  # noqa: B023
        assert any("by position" in p for p in verify(tmp_path / "out").problems)
    # Builds of older versions have no histogram.
    rewritten(tmp_path / "out", lambda values: values.update(lengths={}))
    assert verify(tmp_path / "out").problems == []
    assert advise_length(read_manifest(tmp_path / "out")) is None
