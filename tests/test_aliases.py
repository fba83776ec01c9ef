"""Settings of `sftprep build` by the names of other programs."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftprep import read_manifest
from sftprep.cli.entry import main
from sftprep.config.aliases import replace_aliases, replace_flags
from sftprep.errors import ConfigError
from tests.conftest import EXAMPLES


@pytest.mark.parametrize(
    ("given_flags", "flags"),
    [
        ("--assistant_only_loss --max_seq_length 4k -o out", "--train-on assistant"),
        ("--assistant_only_loss true --cutoff_len 4096 --output out", "--train-on assistant"),
        ("--assistant-only-loss=false --sequence_len=4096 -o out", ""),
        ("--packing true --max-length 4K -o out", ""),
    ],
)
def test_flags_of_other_programs_stand_for_ours(given_flags: str, flags: str) -> None:
    rest = "--max-length 4096 --output out"
    assert [*replace_flags(given_flags.split())] == f"{flags} {rest}".split()


@pytest.mark.parametrize(
    ("given_flags", "flags"),
    [
        ("--packing false", "--packing none"),
        ("--packing exact", "--packing exact"),
        ("--packing false --packing_strategy bfd", "--packing none"),
        ("--packing-strategy=wrapped --packing=False", "--packing none"),
        ("--packing true --packing_strategy wrapped", "--packing wrapped"),
        ("--val_set_size 0.1", "--eval-fraction 0.1"),
        ("--val-size=0", "--eval-fraction 0"),
        ("--packing_strategy wrapped", "--packing wrapped"),
        ("--truncation_mode keep_end", "--truncate-side left"),
        ("--dataset_text_field body", "--text-field body"),
        ("--dataset_num_proc 4", "--workers 4"),
        ("--chat_template_path t.jinja", "--chat-template t.jinja"),
        ("--default_system Hi", "--system Hi"),
        ("a.jsonl -- --packing false -o", "a.jsonl -- --packing false -o"),
    ],
)
def test_each_alias_is_one_setting(given_flags: str, flags: str) -> None:
    assert [*replace_flags(given_flags.split())] == flags.split()


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("--sequence_len 512 --max-length 256", ["--sequence_len", "--max-length"]),
        ("--max-length=256 --max_length 256", ["--max-length", "--max_length"]),
        ("--workers 2 x --dataset-num-proc=2", ["--workers", "--dataset-num-proc"]),
        ("--assistant_only_loss --train-on all", ["--assistant_only_loss", "--train-on"]),
        ("-o a --output b", ["-o", "--output"]),
        ("--packing exact --packing_strategy bfd", ["--packing", "--packing_strategy"]),
    ],
)
def test_a_setting_with_two_names_is_refused_as_it_was_typed(flags: str, names: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        [*replace_flags(flags.split())]
    assert caught.value.message.startswith(" and ".join(names) + " are names of the same")


@given(st.lists(st.sampled_from(["--tokenizer", "x", "--json", "-", "4k", "--limit=2", "", "a-o"])))
def test_other_arguments_are_unchanged(tokens: list[str]) -> None:
    assert [*replace_flags(tokens)] == tokens


def test_settings_of_a_file_have_aliases_too() -> None:
    found = replace_aliases({"assistant_only_loss": True, "packing": False, "cutoff_len": 512})
    assert found == {"train_on": "assistant", "packing": "none", "max_length": 512}
    assert replace_aliases({"assistant_only_loss": False, "packing": True}) == {}
    assert replace_aliases({"packing_strategy": "bfd", "packing": False}) == {"packing": "none"}
    assert replace_aliases({"val_size": "0.1"}) == {"eval_fraction": "0.1"}
    with pytest.raises(ConfigError, match="cutoff_len and max_length are names of the same"):
        replace_aliases({"cutoff_len": 512, "max_length": 512})


@pytest.mark.parametrize(
    "flags", [["--truncation_mode", "middle"], ["--assistant_only_loss=2"], ["--val_size", "100"]]
)
def test_values_without_a_counterpart_are_refused(flags: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        [*replace_flags(flags)]
    assert caught.value.remedy


def test_a_build_with_the_flags_of_trl(tokenizer_dir: Path, tmp_path: Path) -> None:
    arguments = ["build", str(EXAMPLES / "data" / "qa.jsonl"), "--tokenizer", str(tokenizer_dir)]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "-o", str(tmp_path / "o"), "--max_seq_length", "1k", "--packing=false"])
    assert ended.value.code == 0
    assert read_manifest(tmp_path / "o").max_length == 1024
