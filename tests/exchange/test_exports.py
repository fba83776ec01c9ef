"""Exports keep all tokens, trained positions, boundaries and weights, or are refused."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

import sftprep
from sftprep.errors import ConfigError, ManifestError, OutputBusy, OutputExists, ShardError
from sftprep.exchange.exports import mds_files, parquet_files
from sftprep.exchange.exports.mds_files import MdsFiles
from sftprep.exchange.exports.rows import shifted_row
from sftprep.exchange.exports.targets import TARGETS
from sftprep.shards.locks import exclusive
from sftprep.shards.reading.pack import Pack
from tests.exchange.conftest import CHATS, make_build
from tests.exchange.contents import expected_packs, labelled_packs
from tests.pipeline.builds import content


def weighted(rows: list[Any]) -> list[Any]:
    """Return conversations of which the first answer has half the weight."""
    changed = json.loads(json.dumps(rows))
    for row in changed:
        row["messages"][1]["weight"] = 0.5
    return list(changed)


@pytest.fixture(scope="module")
def weighted_build(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    return make_build(tmp_path_factory.mktemp("weighted"), tokenizer_dir, weighted(CHATS[:20]))


# --- contents -------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["trl", "hf"])
def test_load_dataset_gives_the_packs_of_both_splits(
    target: str, build: Path, tmp_path: Path
) -> None:
    report = sftprep.export(build, to=target, output=tmp_path / "out")
    data = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert set(data) == {"train", "validation"}
    for split in report.splits:
        expected = expected_packs(build, split.name)
        assert labelled_packs(data[split.name]) == expected
        assert split.rows == len(expected)
        assert split.tokens == sum(len(ids) for pack in expected for ids, _, _ in pack)
        assert split.trained_tokens == sum(sum(t) for pack in expected for _, t, _ in pack)


def test_hf_has_the_columns_of_the_build(weighted_build: Path, tmp_path: Path) -> None:
    sftprep.export(weighted_build, to="hf", output=tmp_path / "out")
    data = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    packs = sftprep.open_shards(weighted_build)
    assert len(data["train"]) == len(packs)
    for row, pack in zip(data["train"], packs, strict=True):
        for name in ("input_ids", "position_ids", "completion_mask", "seq_lengths"):
            assert row[name] == getattr(pack, name).tolist()
        assert pack.loss_weights is not None
        assert row["loss_weights"] == pack.loss_weights.tolist()
        assert 0.5 in row["loss_weights"]


def test_a_row_for_axolotl_is_a_sequence(build: Path, tmp_path: Path) -> None:
    sftprep.export(build, to="axolotl", output=tmp_path / "out")
    data = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    for split in ("train", "validation"):
        rows = [
            {**row, "seq_lengths": [len(row["input_ids"])]}
            for row in data[split]
            if row["attention_mask"] == [1] * len(row["input_ids"])
        ]
        expected = [[sequence] for pack in expected_packs(build, split) for sequence in pack]
        assert labelled_packs(rows) == expected


def test_the_mask_for_megatron_bridge_is_at_the_predicting_token(
    build: Path, tmp_path: Path
) -> None:
    sftprep.export(build, to="megatron-bridge", output=tmp_path / "out")
    for split in ("train", "validation"):
        (path,) = (tmp_path / "out" / split).iterdir()
        assert path.name.endswith(".idx.parquet")
        table = pq.read_table(path)
        types = {field.name: str(field.type.value_type) for field in table.schema}
        assert types == {"input_ids": "int32", "loss_mask": "int8", "seq_start_id": "int32"}
        assert [megatron_sequences(row) for row in table.to_pylist()] == expected_packs(
            build, split
        )


def megatron_sequences(row: dict[str, list[int]]) -> list[Any]:
    """Return the sequences of a row; a mask is that of the next token, as in Megatron-Bridge."""
    starts = row["seq_start_id"]
    assert starts[0] == 0
    assert len(row["loss_mask"]) == len(row["input_ids"])
    found = []
    for first, last in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
        mask = row["loss_mask"][first:last]
        assert mask[-1] == 0  # it would be the loss of the next sequence
        targets = [False, *(value == 1 for value in mask[:-1])]
        found.append((row["input_ids"][first:last], targets, [float(t) for t in targets]))
    return found


def test_the_shift_of_the_mask_stays_in_a_sequence() -> None:
    pack = Pack(
        input_ids=np.array([5, 6, 7, 8, 9], np.int32),
        position_ids=np.array([0, 1, 2, 0, 1]),
        completion_mask=np.array([True, False, True, True, True]),
        seq_lengths=np.array([3, 2], np.int32),
        origin=np.array([0, 1]),
    )
    row = shifted_row(pack)
    assert row["loss_mask"].tolist() == [0, 1, 0, 1, 0]
    assert row["seq_start_id"].tolist() == [0, 3]


def test_mds_shards_contain_the_packs(weighted_build: Path, tmp_path: Path) -> None:
    sftprep.export(weighted_build, to="mds", output=tmp_path / "out")
    for split in ("train", "validation"):
        rows = read_mds(tmp_path / "out" / split)
        assert labelled_packs(rows) == expected_packs(weighted_build, split)


def read_mds(folder: Path) -> list[dict[str, Any]]:
    """Read MDS shards by the description of the format."""
    rows = []
    for shard in json.loads((folder / "index.json").read_bytes())["shards"]:
        data = (folder / shard["raw_data"]["basename"]).read_bytes()
        assert (len(data), shard["format"], shard["version"]) == (
            shard["raw_data"]["bytes"],
            "mds",
            2,
        )
        (samples,) = struct.unpack_from("<I", data)
        assert samples == shard["samples"]
        offsets = struct.unpack_from(f"<{samples + 1}I", data, 4)
        header = json.loads(data[4 * (samples + 2) : offsets[0]])
        assert header["column_names"] == shard["column_names"] == sorted(shard["column_names"])
        assert offsets[-1] == len(data)
        names, kinds = shard["column_names"], shard["column_encodings"]
        for begin in offsets[:-1]:
            sizes = struct.unpack_from(f"<{len(names)}I", data, begin)
            at, row = begin + 4 * len(names), {}
            for name, kind, size in zip(names, kinds, sizes, strict=True):
                row[name] = decode_array(data[at : at + size], kind.removeprefix("ndarray:"))
                at += size
            rows.append(row)
    return rows


def decode_array(data: bytes, kind: str) -> list[Any]:
    assert data[0] >> 2 == 1  # axes
    width = 1 << (data[0] & 3)
    length = int.from_bytes(data[1 : 1 + width], "little")
    values = np.frombuffer(data[1 + width :], kind)
    assert len(values) == length
    return list(values.tolist())


def test_mds_arrays_have_any_length_and_shards_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mds_files, "_SHARD_BYTES", 600_000)
    lengths = [1, 70_000, 2, 255, 256, 65_535, 300, 1]
    writer = MdsFiles(tmp_path, {"input_ids": "int32", "loss_weights": "float32"})
    rows = [
        {
            "input_ids": np.arange(length, dtype=np.int32),
            "loss_weights": np.arange(length, dtype=np.float32) / 2,
        }
        for length in lengths
    ]
    for row in rows:
        writer.add(row)
    writer.close()
    assert len([*tmp_path.glob("*.mds")]) == 2
    assert read_mds(tmp_path) == [
        {name: values.tolist() for name, values in row.items()} for row in rows
    ]


def test_parquet_files_end_at_their_limits(
    build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_files, "_GROUP_ROWS", 2)
    monkeypatch.setattr(parquet_files, "_FILE_TOKENS", 600)
    sftprep.export(build, to="trl", output=tmp_path / "out")
    files = sorted((tmp_path / "out/train").iterdir())
    assert len(files) > 1
    assert pq.ParquetFile(files[0]).metadata.num_row_groups > 1
    data = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert labelled_packs(data["train"]) == expected_packs(build, "train")


def test_wrapped_packing_and_single_tokens_survive(tokenizer_dir: Path, tmp_path: Path) -> None:
    wrapped = make_build(
        tmp_path, tokenizer_dir, CHATS[:12], packing="wrapped", max_length=16, eval_fraction=0.0
    )
    report = sftprep.export(wrapped, to="trl", output=tmp_path / "out")
    data = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert set(data) == {"train"} == {split.name for split in report.splits}
    assert labelled_packs(data["train"]) == expected_packs(wrapped, "train")


def test_the_layout_of_the_build_does_not_matter(
    build: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    planned = make_build(tmp_path, tokenizer_dir, CHATS, layout="sequences")
    sftprep.export(planned, to="trl", output=tmp_path / "out")
    data = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    for split in ("train", "validation"):
        assert labelled_packs(data[split]) == expected_packs(build, split)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [name for name in TARGETS if not TARGETS[name].keeps_weights])
def test_a_format_without_weights_refuses_them(
    target: str, weighted_build: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"weight 0\.5.*cannot express") as caught:
        sftprep.export(weighted_build, to=target, output=tmp_path / "out")
    assert 'to="hf"' in str(caught.value)
    assert not [*tmp_path.iterdir()]


def test_megatron_bridge_refuses_targets_after_an_end_token(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    everything = make_build(tmp_path, tokenizer_dir, CHATS[:6], train_on="all", eval_fraction=0.0)
    with pytest.raises(ConfigError, match="no loss for them") as caught:
        sftprep.export(everything, to="megatron-bridge", output=tmp_path / "out")
    assert 'train_on="assistant"' in str(caught.value)
    assert not (tmp_path / "out").exists()
    sftprep.export(everything, to="trl", output=tmp_path / "out")  # others can express it


def test_an_unknown_format_and_a_folder_without_a_build(build: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose one of trl, hf"):
        sftprep.export(build, to="parquet", output=tmp_path / "out")
    with pytest.raises(ManifestError):
        sftprep.export(tmp_path, to="trl", output=tmp_path / "out")
    with pytest.raises(ConfigError):
        sftprep.export(build, to="trl", output="s3://bucket/out")
    assert not [*tmp_path.iterdir()]


# --- the output folder ----------------------------------------------------------------------------


def test_the_same_export_again_is_up_to_date(build: Path, tmp_path: Path) -> None:
    first = sftprep.export(build, to="trl", output=tmp_path / "out")
    before = content(tmp_path / "out")
    second = sftprep.export(build, to="trl", output=tmp_path / "out", overwrite=True)
    assert (first.is_up_to_date, second.is_up_to_date) == (False, True)
    assert (first.splits, first.bytes, first.script) == (second.splits, second.bytes, second.script)
    assert content(tmp_path / "out") == before
    assert sum(len(data) for data in before.values()) == first.bytes
    assert len(before) == first.files


def test_another_export_is_replaced_as_a_whole(build: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sftprep.export(build, to="trl", output=out)
    before = content(out)
    with pytest.raises(OutputExists, match="another export, for trl"):
        sftprep.export(build, to="mds", output=out)
    assert content(out) == before
    sftprep.export(build, to="mds", output=out, overwrite=True)
    assert not [name for name in content(out) if name.endswith(".parquet")]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["notes.txt", "train/more.parquet", ".gitignore"])
def test_files_of_a_user_are_never_removed(name: str, build: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sftprep.export(build, to="trl", output=out)
    (out / name).write_text("mine")
    with pytest.raises(OutputExists, match=f"contains {name}"):
        sftprep.export(build, to="mds", output=out, overwrite=True)
    assert (out / name).read_text() == "mine"


def test_a_build_is_no_output_folder(build: Path) -> None:
    before = content(build)
    for output in (build, build / "export", build / "eval"):
        with pytest.raises(OutputExists):
            sftprep.export(build, to="trl", output=output, overwrite=True)
    assert content(build) == before


def test_a_failure_leaves_the_previous_export(
    build: Path, tmp_path: Path, tokenizer_dir: Path
) -> None:
    out = tmp_path / "out"
    sftprep.export(build, to="trl", output=out)
    before = content(out)
    damaged = make_build(tmp_path, tokenizer_dir, CHATS[:10])
    (shard,) = damaged.glob("shards/*/*.arrow")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ShardError):
        sftprep.export(damaged, to="trl", output=out, overwrite=True)
    assert content(out) == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", "b", "chats.jsonl"}


def test_what_killed_exports_left_is_removed_or_restored(build: Path, tmp_path: Path) -> None:
    from sftprep.core.atomic_write import temporary_name

    out = tmp_path / "out"
    sftprep.export(build, to="trl", output=out)
    # Killed between the two renames: the previous export has a temporary name.
    out.rename(tmp_path / temporary_name("out"))
    unfinished = tmp_path / temporary_name("out")
    (unfinished / "train").mkdir(parents=True)
    (unfinished / "train/00000.parquet").write_bytes(b"PAR1")
    (tmp_path / ".out.mine.tmp").mkdir()
    report = sftprep.export(build, to="trl", output=out)
    assert report.is_up_to_date
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.mine.tmp"}


def test_two_exports_at_once(build: Path, tmp_path: Path) -> None:
    with (
        exclusive(tmp_path / ".out.lock", "another export", tmp_path, remedy="wait"),
        pytest.raises(OutputBusy, match="another export"),
    ):
        sftprep.export(build, to="trl", output=tmp_path / "out")


def test_progress_counts_the_packs_of_both_splits(build: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    report = sftprep.export(
        build, to="trl", output=tmp_path / "out", progress=lambda *call: calls.append(call)
    )
    total = sum(split.rows for split in report.splits)
    assert calls == [("export", number, total) for number in range(1, total + 1)]


def test_the_command_prints_a_summary_and_the_lines(build: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sftprep", "export", str(build), "--to", "trl"]
    command += ["--output", str(tmp_path / "out")]

    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *flags], capture_output=True, text=True, timeout=120, check=False
        )

    first, second, as_json = run(), run(), run("--json")
    assert (first.returncode, second.returncode, as_json.returncode) == (0, 0, 0)
    assert first.stdout.startswith("exported 4 files of ")
    assert "padding_free=True" in first.stdout
    assert second.stdout.startswith("up to date: 4 files")
    data = json.loads(as_json.stdout)
    assert data["is_up_to_date"]
    assert data["script"] in first.stdout
    assert [split["name"] for split in data["splits"]] == ["train", "validation"]


# --- the lines for the other tool -----------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_the_lines_are_valid_and_in_the_readme(target: str, build: Path, tmp_path: Path) -> None:
    report = sftprep.export(build, to=target, output=tmp_path / "it's out")
    assert report.script in (tmp_path / "it's out/README.md").read_text(encoding="utf-8")
    if target == "axolotl":
        import yaml

        settings = yaml.safe_load(report.script)
        assert settings["datasets"] == [
            {"path": str(tmp_path / "it's out"), "split": "train", "type": None}
        ]
        assert settings["test_datasets"][0]["split"] == "validation"
    else:
        compile(report.script, "script", "exec")
