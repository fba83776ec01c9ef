"""The data card of a build: `datasets` loads both splits by it, and a user's own file stays."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sftprep import BuildReport, build, merge, open_shards, read_manifest, verify
from sftprep.config import read_config_file
from sftprep.pipeline.output import data_card as data_card_module
from sftprep.shards.ownership import is_card
from tests.pipeline.group_inputs import GROUP_BYTES, texts_of, write

Run = Callable[..., BuildReport]
CHAT = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]


@pytest.fixture
def run(tokenizer_dir: Path, tmp_path: Path) -> Run:
    def run_build(inputs: Any, name: str = "o", **more: Any) -> BuildReport:
        fixed = {"group_bytes": GROUP_BYTES, "max_length": 128, "workers": 1, "overwrite": True}
        data = () if inputs is None else (inputs,)
        return build(*data, output=tmp_path / name, tokenizer=tokenizer_dir, **(fixed | more))

    return run_build


def load(folder: Path) -> Any:
    """Return what `datasets` loads from a folder alone."""
    import datasets

    return datasets.load_dataset(str(folder), cache_dir=str(folder.parent / "huggingface"))


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text()


def front_matter(text: str) -> dict[str, Any]:
    start, block, _ = text.split("---\n", 2)
    assert start == ""
    values: dict[str, Any] = yaml.safe_load(block)
    return values


def listed_files(folder: Path) -> dict[str, list[str]]:
    """Return the files of each split that the card lists."""
    (config,) = front_matter(card_of(folder))["configs"]
    return {split["split"]: split["path"] for split in config["data_files"]}


def settings_in(text: str, path: Path) -> dict[str, Any]:
    """Return the settings that a card shows, as the command reads them."""
    found = re.search(r"^(`{3,})yaml\n(.*?)^\1$", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    path.write_text(found[2])
    return read_config_file(str(path))


def shard_paths(folder: Path, prefix: str = "") -> list[str]:
    return [f"{prefix}shards/{shard.name}" for shard in read_manifest(folder).shards]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [
        {
            "input_ids": pack.input_ids.tolist(),
            "completion_mask": pack.completion_mask.tolist(),
            "seq_lengths": pack.seq_lengths.tolist(),
            "origin": pack.origin.tolist(),
        }
        for pack in open_shards(folder)
    ]


def test_datasets_loads_both_splits_from_the_folder(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", texts_of(900))
    folder = Path(str(run(path, eval_fraction=0.1, shard_tokens=3_000).folder))
    assert len(read_manifest(folder).groups) > 1
    assert listed_files(folder) == {
        "train": shard_paths(folder),
        "validation": shard_paths(folder / "eval", "eval/"),
    }
    loaded = load(folder)
    assert [*loaded] == ["train", "validation"]
    for split, place in (("train", folder), ("validation", folder / "eval")):
        columns = loaded[split].select_columns([*rows_of(place)[0]])
        assert [*columns] == rows_of(place)


def test_datasets_loads_a_build_without_evaluation(run: Run, tmp_path: Path) -> None:
    folder = Path(str(run(write(tmp_path / "a.jsonl", texts_of(50)), position_ids=False).folder))
    loaded = load(folder)
    assert [*loaded] == ["train"]
    assert loaded["train"].num_rows == read_manifest(folder).rows
    assert "position_ids" not in loaded["train"].features
    assert loaded["train"][0]["input_ids"] == open_shards(folder)[0].input_ids.tolist()


def test_datasets_loads_the_stored_sequences_of_the_other_layout(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", texts_of(300))
    folder = Path(str(run(path, layout="sequences", eval_fraction=0.1).folder))
    loaded = load(folder)
    for split, place in (("train", folder), ("validation", folder / "eval")):
        expected = [
            p.input_ids.tolist() for p in open_shards(place, packing="none", max_length=999)
        ]
        assert sorted(loaded[split]["input_ids"]) == sorted(expected)
        assert isinstance(loaded[split][0]["origin"], int)
    assert "Each row is a whole sequence" in card_of(folder)
    settings = settings_in(card_of(folder), tmp_path / "build.yaml")
    again = build(**settings, output=tmp_path / "again", workers=1)
    assert again.manifest.digest == read_manifest(folder).digest


def test_datasets_loads_weights_that_only_one_group_has(run: Run, tmp_path: Path) -> None:
    weighted = [CHAT[0], {**CHAT[1], "loss_weight": 0.5}]
    first = [{"messages": CHAT}] * 900
    path = write(tmp_path / "a.jsonl", [*first, {"messages": weighted}])
    folder = Path(str(run(path, train_on="assistant").folder))
    columns = [group.columns for group in read_manifest(folder).read_groups()]
    assert {"loss_weights" in each for each in columns} == {True, False}
    expected = [
        None if pack.loss_weights is None else pack.loss_weights.tolist()
        for pack in open_shards(folder)
    ]
    assert load(folder)["train"]["loss_weights"][:] == expected
    assert None in expected
    assert max(map(len, filter(None, expected))) > 0


def test_a_build_with_the_settings_of_the_card_has_the_same_data(
    run: Run, tokenizer_dir: Path, tmp_path: Path
) -> None:
    paths = [write(tmp_path / f"{n}.jsonl", [*texts_of(99, n), "{"]) for n in range(2)]
    sources = (
        {"path": paths[0], "name": "ä | `b`", "repeat": 2},
        {"path": paths[1], "name": "c\x85d", "map": ("text=body",), "text_field": "body"},
    )
    more: dict[str, Any] = {"packing": "none", "eval_fraction": 0.25, "seed": 3}
    report = run(None, sources=sources, on_bad_record="quarantine", max_rejected="5%", **more)
    settings = settings_in(card_of(Path(str(report.folder))), tmp_path / "build.yaml")
    assert "order" not in settings
    again = build(**settings, output=tmp_path / "again", workers=1)
    assert again.manifest.data_digest == report.manifest.data_digest
    assert again.evaluation is not None
    assert report.evaluation is not None
    assert again.evaluation.data_digest == report.evaluation.data_digest


def test_the_card_shows_the_ledger_and_the_sources(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*texts_of(99), "{"])
    report = run(path, on_bad_record="quarantine", max_length=32)
    text, ledger = card_of(Path(str(report.folder))), report.manifest.accounting
    assert "| rejected: `bad_json` | 1 |  |  |" in text
    assert (
        f"| truncated | {ledger.truncated} | {ledger.tokens_truncated:,} |"
        f" {ledger.trained_truncated:,} |"
    ) in text
    assert (
        f"| packed | {ledger.sequences} | {ledger.tokens:,} | {ledger.trained_tokens:,} |" in text
    )
    assert f"| `{path}` |  | 100 |" in text
    assert report.manifest.data_digest in text


def test_names_cannot_change_the_structure_of_the_card(run: Run, tmp_path: Path) -> None:
    name = "a\n---\nconfigs: [] | ```` <b>"
    source = {"path": write(tmp_path / "a.jsonl", texts_of(9)), "name": name}
    folder = Path(str(run(None, sources=(source,)).folder))
    assert listed_files(folder) == {"train": shard_paths(folder)}
    assert settings_in(card_of(folder), tmp_path / "build.yaml")["sources"][0]["name"] == name
    (row,) = (line for line in card_of(folder).splitlines() if r"\|" in line)
    assert row.startswith("| ````` a")


def test_a_card_of_too_many_shards_says_so(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_card_module, "LISTED_SHARDS", 3)
    path = write(tmp_path / "a.jsonl", texts_of(99))
    for name, shard_tokens in (("few", 3_000), ("many", 200)):
        folder = Path(str(run(path, name, shard_tokens=shard_tokens).folder))
        assert (read_manifest(folder).num_shards > 3) == (name == "many")
    assert load(tmp_path / "few")["train"].num_rows
    assert "has more than 3 shards" in card_of(tmp_path / "many")
    assert listed_files(tmp_path / "many") == {"train": [data_card_module.NOT_LISTED]}
    with pytest.raises(FileNotFoundError, match=data_card_module.NOT_LISTED):
        load(tmp_path / "many")


def test_the_card_is_replaced_with_the_build_and_belongs_to_no_digest(
    run: Run, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", texts_of(99))
    first = run(path, eval_fraction=0.3)
    folder = Path(str(first.folder))
    assert is_card((folder / "README.md").read_bytes())
    run(path, seed=1)
    assert listed_files(folder) == {"train": shard_paths(folder)}
    digest = read_manifest(folder).digest
    (folder / "README.md").unlink()
    assert verify(folder).ok
    assert read_manifest(folder).digest == digest
    run(path, seed=1)
    assert listed_files(folder) == {"train": shard_paths(folder)}


@pytest.mark.parametrize("kind", ["own", "changed", "link", "folder"])
def test_a_readme_of_a_user_stays_and_is_reported_once(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    path, readme = write(tmp_path / "a.jsonl", texts_of(20)), tmp_path / "o" / "README.md"
    if kind == "changed":
        run(path)
        readme.write_text(f"{readme.read_text()}\nand a remark\n")
    else:
        readme.parent.mkdir()
        if kind == "own":
            readme.write_text("mine")
        elif kind == "link":
            os.symlink(write(tmp_path / "mine.md", ["mine"]), readme)
        else:
            readme.mkdir()
    before = readme.lstat(), None if kind == "folder" else readme.read_bytes()
    for seed in (1, 2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            run(path, seed=seed)
        assert caplog.text.count("is not a data card as a build wrote it") == 1
    assert (readme.lstat(), None if kind == "folder" else readme.read_bytes()) == before
    assert verify(tmp_path / "o").ok


def test_parts_write_no_card_before_the_build_is_finished(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", texts_of(900))
    for part in ("1/2", "2/2"):
        run(path, part=part, eval_fraction=0.1)
        assert not (tmp_path / "o" / "README.md").exists()
    run(path, eval_fraction=0.1)
    run(path, "whole", eval_fraction=0.1)
    assert card_of(tmp_path / "o") == card_of(tmp_path / "whole")


def test_the_card_of_a_merged_build_lists_the_shards_of_all(run: Run, tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{n}.jsonl", texts_of(99, n, str(n))) for n in range(2)]
    for number, path in enumerate(paths):
        run(path, f"build{number}", eval_fraction=0.2)
    merge(tmp_path / "build0", tmp_path / "build1", output=tmp_path / "merged")
    loaded = load(tmp_path / "merged")
    for split, place in (("train", ""), ("validation", "eval")):
        assert loaded[split]["input_ids"][:] == [
            row["input_ids"] for n in range(2) for row in rows_of(tmp_path / f"build{n}" / place)
        ]
    text = card_of(tmp_path / "merged")
    assert "merged from others with `sftprep merge`" in text
    assert settings_in(text, tmp_path / "build.yaml")["inputs"] == paths
