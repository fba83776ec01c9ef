"""Settings are checked once, where they are made, and say what to do."""

from __future__ import annotations

import pickle

import pytest

from sftprep.config import BuildConfig, FormatConfig, OutputConfig, PackConfig, TokenizeConfig, digest, read_config_file
from sftprep.errors import ConfigError, MissingDependency, RecordError, SftprepError


def test_flat_settings_reach_their_part():
    config = BuildConfig.of(inputs="a.jsonl", tokenizer="t", output="o", max_length=64, map="q=p,a=c", train_on="all")
    assert config.source.inputs == ("a.jsonl",)
    assert config.format.renames() == {"q": "p", "a": "c"}
    assert (config.pack.max_length, config.tokenize.tokenizer, config.output.output) == (64, "t", "o")
    assert BuildConfig.of(**config.flat()) == config


def test_an_unknown_setting_names_the_nearest_one():
    with pytest.raises(ConfigError, match=r"unknown setting 'max_lenght'[\s\S]*did you mean 'max_length'"):
        BuildConfig.of(max_lenght=3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: PackConfig(max_length=1),
        lambda: PackConfig(packing="best"),
        lambda: PackConfig(seed=-1),
        lambda: FormatConfig(map=("a",)),
        lambda: FormatConfig(map=("=a",)),
        lambda: FormatConfig(train_on="prompt"),
        lambda: TokenizeConfig(date="yesterday"),
        lambda: OutputConfig(workers=0),
        lambda: OutputConfig(max_rejected="many"),
        lambda: OutputConfig(max_rejected="101%"),
        lambda: OutputConfig(max_rejected="nan"),
        lambda: OutputConfig(shard_tokens=0),
    ],
)
def test_a_setting_that_cannot_be_is_refused_with_a_remedy(make):
    with pytest.raises(ConfigError) as caught:
        make()
    assert caught.value.remedy


def test_the_limit_of_rejected_records_is_a_share_or_a_count():
    assert OutputConfig(max_rejected="1%").rejected_limit(1000) == 10
    assert OutputConfig(max_rejected="0").rejected_limit(1000) == 0
    assert OutputConfig(max_rejected="250").rejected_limit(1000) == 250


def test_a_config_file_takes_dashes_and_refuses_what_is_no_mapping(tmp_path):
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


def test_digests_tell_settings_apart_and_do_not_depend_on_order():
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
def test_errors_survive_the_way_back_from_a_worker(error: SftprepError):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)


@pytest.mark.parametrize(
    "wrong",
    [{"weight": 1e-9}, {"weight": 1e300}, {"weight": "abc"}, {"repeat": 1e9}, {"repeat": True}, {"limit": 2.5}, {"limit": 0}],
)
def test_factors_and_limits_of_a_source_are_checked(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        BuildConfig.of(sources=[{"path": "a.jsonl", **wrong}], tokenizer="t", output="o")
