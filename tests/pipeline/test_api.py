"""`sftprep.build` makes the same build from the same records in any container."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

import sftprep
from sftprep import BuildConfig, build, read_manifest
from sftprep.errors import ConfigError, EmptyInput, FormatError, InputNotFound, RecordError
from sftprep.sources import groups
from sftprep.sources import in_memory as memory
from tests.conftest import EXAMPLES
from tests.pipeline.builds import check_accounting, content, texts

datasets = pytest.importorskip("datasets")
pandas = pytest.importorskip("pandas")

CHATS = EXAMPLES / "data" / "chats.jsonl"
ROWS = [json.loads(line) for line in CHATS.read_text().splitlines()]


def of(source, tokenizer_dir, output, **settings):
    return build(source, tokenizer=tokenizer_dir, output=output, **{"max_length": 256, **settings})


@pytest.fixture(scope="module")
def from_file(tokenizer_dir, tmp_path_factory):
    return texts(of(str(CHATS), tokenizer_dir, tmp_path_factory.mktemp("file") / "o").folder)


def generated():
    yield from ROWS


class Rows:
    def __iter__(self):
        return iter(ROWS)


CONTAINERS = {
    "path": lambda: CHATS,
    "paths": lambda: [str(CHATS)],
    "list": lambda: ROWS,
    "iterable": Rows,
    "iterator": lambda: iter(ROWS),
    "generator": generated,
    "function": lambda: generated,
    "table": lambda: pa.Table.from_pylist(ROWS),
    "Dataset": lambda: datasets.Dataset.from_list(ROWS),
    "a part of a Dataset": (
        lambda: datasets.Dataset.from_list(ROWS[:3] + ROWS).select(range(3, 3 + len(ROWS)))
    ),
    "IterableDataset": lambda: datasets.Dataset.from_list(ROWS).to_iterable_dataset(num_shards=2),
    "IterableDataset of a generator": lambda: datasets.IterableDataset.from_generator(generated),
    "with a transform": (
        lambda: datasets.Dataset.from_list(
            [{"raw": json.dumps(row)} for row in ROWS]
        ).with_transform(
            lambda batch: {"messages": [json.loads(raw)["messages"] for raw in batch["raw"]]}
        )
    ),
    "with a format": lambda: datasets.Dataset.from_list(ROWS).with_format("numpy"),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_of_the_same_records_gives_the_same_sequences(
    tokenizer_dir, tmp_path, monkeypatch, from_file, name
):
    monkeypatch.setattr(memory, "PARTITION_BYTES", 20_000)
    report = of(CONTAINERS[name](), tokenizer_dir, tmp_path / "o")
    assert texts(report.folder) == from_file
    check_accounting(report.folder)
    assert report.manifest.accounting.records == len(ROWS)
    # A second build, for some containers with workers, has the same bytes.
    again = of(
        CONTAINERS[name](),
        tokenizer_dir,
        tmp_path / "again",
        workers=2 if name in ("list", "Dataset") else 1,
    )
    assert content(again.folder) == content(report.folder)


def test_the_digest_of_data_in_memory_depends_on_its_content_only(tokenizer_dir, tmp_path):
    one = of(ROWS, tokenizer_dir, tmp_path / "a").manifest.inputs[0]
    two = of(iter(ROWS), tokenizer_dir, tmp_path / "b").manifest.inputs[0]
    other = of(ROWS[1:], tokenizer_dir, tmp_path / "c").manifest.inputs[0]
    assert one.digest == two.digest != other.digest
    assert (one.path, two.path) == ("<list>", "<list_iterator>")


def test_a_spill_is_reused_by_another_container_of_the_same_records(tokenizer_dir, tmp_path):
    of(ROWS, tokenizer_dir, tmp_path / "o", keep_spill=True)
    assert (
        of(iter(ROWS), tokenizer_dir, tmp_path / "o", keep_spill=True, overwrite=True).reused == 1
    )


def test_errors_about_records_in_memory_have_the_number_of_the_row(tokenizer_dir, tmp_path):
    rows = [{"text": "a b"}, {"text": "c d"}, {"text": b"raw"}]
    with pytest.raises(RecordError, match=r"<list>:3: .*bad_type"):
        of(rows, tokenizer_dir, tmp_path / "o")
    report = of(rows, tokenizer_dir, tmp_path / "q", on_bad_record="quarantine", max_rejected="50%")
    assert report.manifest.accounting.rejected == {"bad_type": 1}


SPLITS = {"train": ROWS[:100], "test": ROWS[100:130], "other": ROWS[130:]}


def dataset_dict(*names, streamed=False):
    made = {name: datasets.Dataset.from_list(SPLITS[name]) for name in names}
    if streamed:
        return datasets.IterableDatasetDict(
            {name: data.to_iterable_dataset() for name, data in made.items()}
        )
    return datasets.DatasetDict(made)


@pytest.mark.parametrize("streamed", [False, True])
def test_the_splits_of_a_dict_are_the_training_and_the_evaluation_data(
    tokenizer_dir, tmp_path, streamed
):
    report = of(dataset_dict("train", "test", streamed=streamed), tokenizer_dir, tmp_path / "o")
    assert report.manifest.accounting.records == 100
    assert report.evaluation is not None
    assert report.evaluation.accounting.records == 30
    assert texts(tmp_path / "o" / "eval") == texts(
        of(SPLITS["test"], tokenizer_dir, tmp_path / "t").folder
    )


def test_settings_choose_among_several_splits(tokenizer_dir, tmp_path):
    three = dataset_dict("train", "test", "other")
    with pytest.raises(
        ConfigError, match=r"train, test, other[\s\S]*eval_split=.test[\s\S]*split=.train"
    ):
        of(three, tokenizer_dir, tmp_path / "o")
    report = of(three, tokenizer_dir, tmp_path / "o", eval_split="other")
    assert (report.manifest.accounting.records, report.evaluation.accounting.records) == (
        100,
        len(ROWS) - 130,
    )
    alone = of(three, tokenizer_dir, tmp_path / "alone", split="test")
    assert (alone.manifest.accounting.records, alone.evaluation) == (30, None)
    with pytest.raises(ConfigError, match="no split 'dev'"):
        of(three, tokenizer_dir, tmp_path / "x", split="dev")
    held = of(dataset_dict("train", "test"), tokenizer_dir, tmp_path / "held", eval_fraction=0.2)
    assert held.manifest.accounting.records == 100


def test_evaluation_records_may_be_another_source(tokenizer_dir, tmp_path):
    report = of(CHATS, tokenizer_dir, tmp_path / "o", eval_source=ROWS[:5], eval_packing="none")
    assert report.evaluation.rows == 5
    assert read_manifest(tmp_path / "o" / "eval").inputs[0].path == "<list>"


def test_a_source_may_be_a_mixture_or_a_config(tokenizer_dir, tmp_path):
    report = build(
        sources=[{"path": str(CHATS), "limit": 10}], tokenizer=tokenizer_dir, output=tmp_path / "o"
    )
    assert report.manifest.accounting.records == 10
    config = BuildConfig.of(
        inputs=str(CHATS), tokenizer=str(tokenizer_dir), output=str(tmp_path / "c"), max_length=256
    )
    assert build(config).manifest.accounting.records == len(ROWS)
    with pytest.raises(ConfigError, match="cannot be combined"):
        build(config, max_length=3)
    with pytest.raises(ConfigError, match="unknown setting 'max_lenght'"):
        of(ROWS, tokenizer_dir, tmp_path / "x", max_lenght=3)


def test_a_tokenizer_object_gives_the_same_sequences(tokenizer_dir, tmp_path, from_file):
    transformers = pytest.importorskip("transformers")
    live = transformers.AutoTokenizer.from_pretrained(tokenizer_dir)
    assert (
        texts(build(ROWS, tokenizer=live, output=tmp_path / "o", max_length=256).folder)
        == from_file
    )


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (5, ConfigError, "cannot be read from an object of type int"),
        ({"text": "a"}, InputNotFound, "a does not exist"),
        ({"text": ["a", "b"]}, ConfigError, r"columns[\s\S]*from_dict"),
        (pandas.DataFrame({"text": ["a"]}), ConfigError, r"DataFrame[\s\S]*from_pandas"),
        (lambda: 5, ConfigError, "returned an object of type int"),
        ([], EmptyInput, "no usable record"),
        ([5], RecordError, "a row is a mapping"),
        ([{"x": 1}], FormatError, "no format fits <list>"),
        (None, ConfigError, "no input"),
    ],
)
def test_unusable_sources_raise_a_typed_error(tokenizer_dir, tmp_path, source, error, message):
    with pytest.raises(error, match=message):
        of(source, tokenizer_dir, tmp_path / "o")


def test_the_repr_of_a_report_is_short(tokenizer_dir, tmp_path):
    shown = repr(of(ROWS[:2], tokenizer_dir, tmp_path / "o", eval_source=ROWS[2:4]))
    assert "folder=" in shown
    assert len(shown) < 300 + len(str(tmp_path))


def test_python_m_is_the_command():
    made = subprocess.run(
        [sys.executable, "-m", "sftprep", "--help"], check=False, capture_output=True, text=True
    )
    assert made.returncode == 0
    assert "sftprep build" in made.stdout


# --- records from tables -------------------------------------------------------------------------

CALLS = [
    {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}],
        "tools": [{"x": 8.854e-12}],
    },
    {
        "messages": [
            {"role": "user", "content": "Hi", "name": "Ann"},
            {"role": "assistant", "content": "No"},
        ],
        "tools": [{"y": 1}],
    },
]


def test_nulls_that_a_table_adds_are_kept_as_in_trl_unless_strip_nulls_is_set(
    tokenizer_dir, tmp_path
):
    """`datasets` gives every row the keys of all rows. TRL passes those in tools to the template,
    and so do we."""
    table = pa.Table.from_pylist(CALLS)
    assert table.to_pylist()[0]["tools"] == [{"x": 8.854e-12, "y": None}]
    template = tmp_path / "t.jinja"
    template.write_text("{{ tools | tojson }}{{ messages | tojson }}{{ eos_token }}")
    shown = {}
    for name, source, more in (
        ("records", CALLS, {}),
        ("table", table, {}),
        ("stripped", table, {"strip_nulls": True}),
    ):
        out = of(
            source,
            tokenizer_dir,
            tmp_path / name,
            chat_template=str(template),
            train_on="all",
            **more,
        ).folder
        shown[name] = texts(out)
    assert shown["table"] != shown["records"]
    assert shown["stripped"] == shown["records"]


def test_records_from_memory_keep_their_numbers_and_absent_keys(tokenizer_dir, tmp_path):
    line = "".join(json.dumps(row) + "\n" for row in CALLS)
    path = tmp_path / "a.jsonl"
    path.write_text(line)
    assert texts(of(CALLS, tokenizer_dir, tmp_path / "m").folder) == texts(
        of(path, tokenizer_dir, tmp_path / "f").folder
    )


def test_datasets_is_imported_only_for_its_own_records(tokenizer_dir, tmp_path):
    code = (
        f"import sys, sftprep\nsftprep.build([{{'text': 'a b'}}], tokenizer={str(tokenizer_dir)!r},"
        f" output={str(tmp_path / 'o')!r})\nassert not {{'datasets', 'torch', 'transformers',"
        " 'huggingface_hub'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(sftprep.__file__).parents[1])


def test_a_failing_generator_leaves_no_build(tokenizer_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(groups, "PARTITION_BYTES", 100)

    def broken():
        yield {"text": "a b"}
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"):
        of(broken, tokenizer_dir, tmp_path / "o")
    assert not (tmp_path / "o" / "manifest.json").exists()
