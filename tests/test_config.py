"""Settings are checked when a configuration is created, and errors have a remedy."""

from __future__ import annotations

import pickle

import pytest

from sftprep.cli import main
from sftprep.config import (
    BuildConfig,
    EvalConfig,
    FormatConfig,
    OutputConfig,
    PackConfig,
    TokenizeConfig,
    read_config_file,
)
from sftprep.core.hashing import digest
from sftprep.errors import ConfigError, MissingDependency, RecordError, SftprepError


def test_flat_settings_are_assigned_to_their_part():
    config = BuildConfig.of(
        inputs="a.jsonl", tokenizer="t", output="o", max_length=64, map="q=p,a=c", train_on="all"
    )
    assert config.source.inputs == ("a.jsonl",)
    assert config.format.renames() == {"q": "p", "a": "c"}
    assert (config.pack.max_length, config.tokenize.tokenizer, config.output.output) == (
        64,
        "t",
        "o",
    )
    assert BuildConfig.of(**config.flat()) == config


def test_an_unknown_setting_names_the_nearest_one():
    with pytest.raises(
        ConfigError, match=r"unknown setting 'max_lenght'[\s\S]*did you mean 'max_length'"
    ):
        BuildConfig.of(max_lenght=3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: PackConfig(max_length=1),
        lambda: PackConfig(packing="best"),
        lambda: PackConfig(seed=-1),
        lambda: PackConfig(packing="bfd_split", overlong="error"),
        lambda: PackConfig(packing="bfd_split", overlong="drop"),
        lambda: FormatConfig(map=("a",)),
        lambda: FormatConfig(map=("=a",)),
        lambda: FormatConfig(train_on="prompt"),
        lambda: TokenizeConfig(date="yesterday"),
        lambda: OutputConfig(workers=0),
        lambda: OutputConfig(max_rejected="many"),
        lambda: OutputConfig(max_rejected=1.0),
        lambda: OutputConfig(max_rejected=True),
        lambda: OutputConfig(max_rejected="101%"),
        lambda: OutputConfig(max_rejected="nan"),
        lambda: OutputConfig(shard_tokens=0),
        lambda: EvalConfig(eval_seed=1.5),
        lambda: EvalConfig(eval_fraction="x"),
        lambda: EvalConfig(eval_fraction=1),
    ],
)
def test_an_invalid_setting_is_rejected_with_a_remedy(make):
    with pytest.raises(ConfigError) as caught:
        make()
    assert caught.value.remedy


def test_the_limit_of_rejected_records_is_a_share_or_a_count():
    assert OutputConfig(max_rejected="1%").rejected_limit(1000) == 10
    assert OutputConfig(max_rejected="0").rejected_limit(1000) == 0
    assert OutputConfig(max_rejected=250).rejected_limit(1000) == 250
    assert OutputConfig(max_rejected="250").rejected_limit(1000) == 250


def test_a_config_file_may_use_dashes_and_must_be_a_mapping(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("max-length: 64\npacking: none\n")
    assert read_config_file(str(path)) == {"max_length": 64, "packing": "none"}
    path.write_text("- a\n")
    with pytest.raises(ConfigError, match="not settings"):
        read_config_file(str(path))
    path.write_text("a: [\n")
    with pytest.raises(ConfigError, match="not YAML"):
        read_config_file(str(path))
    with pytest.raises(ConfigError, match="cannot read"):
        read_config_file(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("max_length: 512\nseed: 1\nmax_length: 256\n", "'max_length' twice (line 3)"),
        ("max_length: 512\nmax-length: 512\n", "'max_length' twice"),
        ("sources:\n- {path: a.jsonl, weight: 1, weight: 2}\n", "'weight' twice (line 2)"),
        ('{"a": {"b": 1, "b": 1}}', "'b' twice"),
    ],
)
def test_a_key_that_occurs_twice_is_an_error(text: str, key: str, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_config_file(str(path))
    assert caught.value.message.startswith(f"{path} has {key}")


def test_a_merged_mapping_may_be_replaced_key_by_key(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("a: &a {x: 1, y: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, x: 3}\n")
    assert read_config_file(str(path))["c"] == {"x": 3, "y": 1}


def test_variables_of_templates_that_occur_twice_are_an_error():
    with pytest.raises(ConfigError, match="chat_template_kwargs has 'a' twice"):
        BuildConfig.of(chat_template_kwargs='{"a": 1, "a": 2}')


def test_digests_distinguish_settings_and_do_not_depend_on_order():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest("ab", "c") != digest("a", "bc")


@pytest.mark.parametrize(
    "error",
    [
        RecordError(file="f", line=3, column=7, reason="bad_json", message="m", excerpt="x"),
        MissingDependency("ray", extra="ray", needed_for="this"),
        ConfigError("a", remedy="b"),
    ],
)
def test_errors_can_be_pickled(error: SftprepError):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"weight": wrong} for wrong in (1e-9, 1e300, "abc", True, {})),
        *({"repeat": wrong} for wrong in (1e9, "1e9", True)),
        *({"limit": wrong} for wrong in (2.5, 0, "x")),
        {"map": 5},
        {"strip_nulls": "no"},
        {"split": 4},
    ],
)
def test_factors_and_limits_of_a_source_are_checked(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        BuildConfig.of(sources=[{"path": "a.jsonl", **wrong}], tokenizer="t", output="o")


@pytest.mark.parametrize("path", [5, [5], {"a": "b"}])
def test_a_path_that_is_not_a_string_is_rejected(path):
    with pytest.raises(ConfigError, match="path of a source"):
        BuildConfig.of(sources=[{"path": path}])


def test_numbers_that_yaml_reads_as_strings_are_converted():
    (entry,) = BuildConfig.of(
        sources=[{"path": "a", "weight": "1e-3", "repeat": "2"}]
    ).source.sources
    assert (entry.weight, entry.repeat) == (0.001, 2.0)


def test_sources_with_the_same_name_are_numbered():
    entries = [
        {"path": path, "name": name}
        for path, name in (("1", "a"), ("2", "a"), ("3", "a (2)"), ("4", "a"), ("5", "b"))
    ]
    made = BuildConfig.of(sources=entries)
    assert [entry.name for entry in made.source.sources] == ["a", "a (3)", "a (2)", "a (4)", "b"]
    assert BuildConfig.of(**made.flat()) == made


@pytest.mark.parametrize(
    "flags",
    [
        "--max-length 2.5",
        "--max-length=99.9",
        "--lanes 1.5",
        "--seed -0.5",
        "--pack-window 1e1.5",
        "--config FILE",
    ],
)
def test_whole_numbers_are_not_rounded(flags, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("max_length: 2.5\n")
    words = flags.replace("FILE", str(tmp_path / "c.yaml")).split()
    with pytest.raises(SystemExit) as stopped:
        main(["build", "a.jsonl", "--tokenizer", "t", "--output", str(tmp_path / "o"), *words])
    assert stopped.value.code == 2
    name = "--max-length" if "FILE" in flags else words[0].partition("=")[0]
    assert name in capsys.readouterr().err
