"""Only the files of the data set are read in a folder that `datasets` saved."""

from __future__ import annotations

import json
import shutil

import pytest

from sftprep import build, read_manifest
from sftprep.errors import ConfigError, InputNotFound, InputUnreadable
from sftprep.sources.discovery.files import find_files
from sftprep.sources.partition import cut, read_partition

datasets = pytest.importorskip("datasets")

ROWS = [{"text": f"row {k}"} for k in range(20)]


def texts_of(*inputs, split=None):
    files = find_files(tuple(map(str, inputs)), split)
    lines = b"".join(read_partition(part) for part in cut(files)).splitlines()
    return [json.loads(line)["text"] for line in lines]


def texts(rows):
    return [row["text"] for row in rows]


def save(rows, path, **settings):
    datasets.Dataset.from_list(rows).save_to_disk(path, **settings)
    return path


def save_splits(path, **splits):
    made = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    datasets.DatasetDict(made).save_to_disk(path)
    return path


@pytest.fixture
def saved(tmp_path):
    """A saved Dataset, alone in a folder."""
    return save(ROWS, tmp_path / "in" / "sd", num_shards=2)


def names_for(folder):
    parent = folder.parent
    return [folder, parent, f"{parent}/s*", f"{folder}/*.arrow", f"{parent}/**/*.arrow"]


def test_caches_that_datasets_writes_into_the_folder_are_not_read(saved, caplog):
    loaded = datasets.load_from_disk(saved)
    loaded.map(lambda row: {"text": row["text"] + " changed"})
    loaded.filter(lambda row: row["text"] != "row 3")
    loaded.shuffle(seed=0)
    caches = sorted(saved.glob("cache-*.arrow"))
    assert len(caches) >= 2
    for named in names_for(saved):
        caplog.clear()
        assert texts_of(named) == texts(ROWS)
        assert all(str(cache) in caplog.text for cache in caches)
        assert "(not among the files that the state.json" in caplog.text
        assert "dataset_info" not in caplog.text


def test_shards_of_an_earlier_save_are_not_read(tmp_path, caplog):
    folder = save(ROWS, tmp_path / "in" / "sd", num_shards=4)
    save(ROWS[:5], folder, num_shards=1)
    for named in names_for(folder):
        caplog.clear()
        assert texts_of(named) == texts(ROWS[:5])
        assert f"{folder}/data-00003-of-00004.arrow" in caplog.text


def test_other_files_and_folders_in_a_saved_data_set_are_logged(saved, caplog):
    (saved / "more").mkdir()
    for name in ("more.jsonl", "more/a.jsonl", "notes.txt"):
        (saved / name).write_text('{"text": "more"}\n')
    assert texts_of(saved) == texts(ROWS)
    shown = ", ".join(f"{saved}/{name}" for name in ("more", "more.jsonl", "notes.txt"))
    assert f"not read: {shown} (not among the files" in caplog.text


def test_a_file_of_a_saved_data_set_that_is_named_is_read(saved, caplog):
    for stale in ("cache-0.arrow", "old.arrow"):
        shutil.copy(saved / "data-00000-of-00002.arrow", saved / stale)
    assert texts_of(saved / "cache-0.arrow") == texts(ROWS[:10])
    assert texts_of(saved / "data-00001-of-00002.arrow") == texts(ROWS[10:])
    assert not caplog.records
    with pytest.raises(InputNotFound):
        texts_of(saved / "cache-*.arrow")
    assert f"{saved}/cache-0.arrow (not among the files" in caplog.text


def test_a_missing_file_of_a_saved_data_set_is_an_error(saved):
    (saved / "data-00001-of-00002.arrow").unlink()
    for named in names_for(saved):
        with pytest.raises(InputUnreadable, match=r"data-00001-of-00002\.arrow is missing"):
            texts_of(named)
    assert texts_of(saved / "data-00000*") == texts(ROWS[:10])


@pytest.mark.parametrize("state", ["", "[]", '{"_data_files": 3}', "{}", '{"_data_files": [{}]}'])
def test_a_damaged_list_of_files_is_an_error(saved, state):
    (saved / "state.json").write_text(state)
    with pytest.raises(InputUnreadable, match=r"state\.json does not list the files"):
        texts_of(saved)
    # Without the other file of `datasets`, it was written by another program.
    (saved / "dataset_info.json").unlink()
    assert texts_of(saved) == texts(ROWS)


@pytest.mark.parametrize("name", ["../private.arrow", "/etc/passwd", "..", ""])
def test_a_list_with_names_outside_of_the_folder_is_an_error(saved, name):
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(InputUnreadable, match="outside of its folder"):
        texts_of(saved)


# --- splits ---------------------------------------------------------------------------------------


@pytest.fixture
def splits(tmp_path):
    """A saved DatasetDict, alone in a folder."""
    return save_splits(tmp_path / "in" / "sd", train=ROWS, test=ROWS[:3])


def test_only_train_is_read_however_a_saved_dictionary_is_named(splits, caplog):
    parent = splits.parent
    for named in (splits, *names_for(splits)[1:3], f"{parent}/**/*.arrow", f"{splits}/*"):
        for split in (None, "train"):
            caplog.clear()
            assert texts_of(named, split=split) == texts(ROWS)
            assert f"not read: {splits}/test (not in the split 'train'" in caplog.text
    caplog.clear()
    for named in (splits / "test", f"{parent}/*/test", f"{parent}/*/test/*.arrow"):
        assert texts_of(named) == texts(ROWS[:3])
    assert not caplog.records


def test_the_requested_split_is_read_in_every_saved_dictionary_below_a_folder(splits, caplog):
    parent = splits.parent
    save_splits(parent / "sub" / "other", train=ROWS, test=ROWS[3:5])
    (parent / "test.jsonl").write_text('{"text": "a"}\n')
    (parent / "loose.jsonl").write_text('{"text": "b"}\n')
    assert texts_of(parent, split="test") == [*texts(ROWS[:5]), "a"]
    assert f"{parent}/loose.jsonl (not of the split 'test' by their names)" in caplog.text
    with pytest.raises(ConfigError, match=r"in/s\w+\S* has no split 'dev'"):
        texts_of(parent, split="dev")


def test_splits_with_other_names_have_to_be_chosen_below_a_folder_too(tmp_path):
    save_splits(tmp_path / "in" / "sd", a=ROWS, b=ROWS[:3])
    for named in (tmp_path / "in", tmp_path / "in" / "sd", f"{tmp_path}/in/*"):
        with pytest.raises(ConfigError, match="has the splits a, b"):
            texts_of(named)
    assert texts_of(tmp_path / "in", split="b") == texts(ROWS[:3])


def test_a_missing_split_is_an_error(splits):
    shutil.rmtree(splits / "train")
    for named in (splits, splits.parent):
        with pytest.raises(InputUnreadable, match="sd/train is missing"):
            texts_of(named)


def test_a_folder_of_both_kinds_is_what_datasets_loads_from_it(tmp_path):
    folder = save_splits(tmp_path / "in" / "sd", train=ROWS, test=ROWS[:3])
    save(ROWS[4:6], folder)
    assert texts(datasets.load_from_disk(folder)) == texts(ROWS[4:6])
    for named in (folder, folder.parent):
        assert texts_of(named) == texts(ROWS[4:6])


def test_a_split_to_evaluate_on_is_not_logged_as_skipped(splits, tokenizer_dir, tmp_path, caplog):
    settings = {"tokenizer": tokenizer_dir, "output": tmp_path / "o", "max_length": 64}
    build(str(splits), eval_split="test", **settings)
    assert "not read" not in caplog.text
    counts = [read_manifest(tmp_path / name).inputs[0].records for name in ("o", "o/eval")]
    assert counts == [20, 3]


def test_a_folder_that_matches_a_pattern_is_searched_for_the_split(tmp_path, caplog):
    for name in ("d1/train.jsonl", "d1/test.jsonl", "d2/train-1.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    assert texts_of(f"{tmp_path}/d*", split="train") == ["d1/train.jsonl", "d2/train-1.jsonl"]
    assert f"{tmp_path}/d1/test.jsonl (not of the split 'train' by their names)" in caplog.text
