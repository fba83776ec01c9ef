"""The command `sfttrain run`: its arguments, its output, its errors and its files."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sftprep.errors import ConfigError
from sfttrain.cli import help_text as helptext
from sfttrain.cli.arguments import LORA_LEARNING_RATE, RunConfig, read_arguments
from sfttrain.cli.main import main
from sfttrain.config import ModelConfig, SFTConfig
from sfttrain.config.deprecated import CURRENT_NAMES
from sfttrain.trainer import SFTTrainer
from tests.sfttrain.builds import write_build
from tests.sfttrain.packs import make_packs
from tests.sfttrain.tiny import tiny_model

REQUIRED = ["DIR", "--model", "M", "--output_dir", "O"]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_build(
        tmp_path_factory.mktemp("build") / "packs",
        make_packs(12),
        tokenizer={"name": "", "fingerprint": ""},
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    return folder


def command(build: Path, model: Path, out: Path, *more: str) -> list[str]:
    return [
        *(
            "run",
            str(build),
            "--model",
            str(model),
            "--output_dir",
            str(out),
            "--use_cpu",
            "--max_steps",
            "4",
            "--logging_steps",
            "1",
        ),
        *("--per_device_train_batch_size", "2", "--learning_rate", "1e-2", *more),
    ]


# ---- help ----


def test_short_help_has_the_actual_defaults() -> None:
    defaults = {
        f.name: f.default
        for kind in (RunConfig, ModelConfig, SFTConfig)
        for f in dataclasses.fields(kind)
    }
    for name, stated, _ in (*helptext.OURS, *helptext.TRAINING):
        if name in ("config", "debug"):  # read before the dataclasses are
            continue
        default = defaults[name]
        shown = (
            ""
            if default is None or default is dataclasses.MISSING
            else str(getattr(default, "value", default))
        )
        assert stated == shown, name


def test_short_help_has_all_settings_of_sfttrain_and_twenty_of_trainer() -> None:
    from transformers import TrainingArguments

    theirs = {f.name for f in dataclasses.fields(TrainingArguments)}
    ours = (
        {f.name for f in (*dataclasses.fields(SFTConfig), *dataclasses.fields(RunConfig))}
        - theirs
        - CURRENT_NAMES.keys()
    )
    assert ours <= {name for name, _, _ in helptext.OURS}
    assert len(helptext.TRAINING) == 20
    assert {name for name, _, _ in helptext.TRAINING} <= theirs


def test_short_help_imports_no_large_library() -> None:
    code = (
        "import sys; from sfttrain.cli.main import main; main(['run', '--help']); "
        "sys.exit(bool({'torch', 'transformers', 'numba', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "--lora_r" in done.stdout


def test_full_help_has_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--help-all"]) == 0
    text = capsys.readouterr().out
    for kind in (RunConfig, ModelConfig, SFTConfig):
        assert all(f"--{f.name}" in text for f in dataclasses.fields(kind) if f.init)


def test_env_adds_devices_and_attention_to_the_environment_of_builds(capsys: Any) -> None:
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["torch"] == torch.__version__
    if not torch.cuda.is_available():
        assert (found["devices"], found["attention"]) == ([], "sft_varlen")
        assert "CUDA" in found["attention_unavailable"]["flash_attention_2"]
    assert main(["env"]) == 0
    assert "\nattention        " in capsys.readouterr().out
    assert main(["env", "--help"]) == 0
    assert "usage: sfttrain env" in capsys.readouterr().out


# ---- parsing ----


def test_flags_take_precedence_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "data: D\nmodel_name_or_path: M\noutput_dir: O\nlearning_rate: 1e-3\nlora-r: 4\nuse_peft:"
        " true\nlogging_steps: 3\n"
    )
    request = read_arguments(
        ["--config", str(path), "--logging_steps", "7", "--lora_target_modules", "a", "b"]
    )
    assert (request.run.data, request.model.model_name_or_path, request.training.output_dir) == (
        "D",
        "M",
        "O",
    )
    assert (request.training.learning_rate, request.training.logging_steps) == (1e-3, 7)
    assert (request.model.lora_r, request.model.use_peft, request.model.lora_target_modules) == (
        4,
        True,
        ["a", "b"],
    )
    path.write_text("lora_target_modules: [x, y]\nlr_scheduler_kwargs: {a: 1}\nseed:\n")
    request = read_arguments([*REQUIRED, f"--config={path}"])
    assert request.model.lora_target_modules == ["x", "y"]
    assert request.training.lr_scheduler_kwargs == {"a": 1}
    assert request.training.seed == 42


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([], 2e-5),
        (["--use_peft"], LORA_LEARNING_RATE),
        (["--use_peft", "--learning-rate", "1e-3"], 1e-3),
    ],
)
def test_learning_rate(more: list[str], expected: float) -> None:
    assert read_arguments([*REQUIRED, *more]).training.learning_rate == expected


def test_switches() -> None:
    training = read_arguments(
        [*REQUIRED, "--no_isolation_guard", "--bf16", "--attn_implementation", "unpack"]
    ).training
    assert (training.isolation_guard, training.bf16, training.attn) == (False, True, "unpack")
    assert (
        read_arguments(
            [*REQUIRED, "--attn", "sft_varlen", "--attn_implementation", "unpack"]
        ).training.attn
        == "sft_varlen"
    )
    assert read_arguments([*REQUIRED, "--bf16", "false"]).training.bf16 is False


@pytest.mark.parametrize(
    ("arguments", "message", "remedy"),
    [
        ([*REQUIRED, "--lora_rr", "3"], "unknown option --lora_rr", "lora_r?"),
        ([*REQUIRED, "--max-lenght=3"], "unknown option --max-lenght=3", ""),
        ([*REQUIRED, "--learning_rate", "fast"], "invalid float value: 'fast'", "--help"),
        ([*REQUIRED, "--lora_dropout", "nan"], "lora_dropout is nan", "from 0 to 1"),
        ([*REQUIRED, "--lora_dropout", "1.5"], "lora_dropout is 1.5", "from 0 to 1"),
        ([*REQUIRED, "--num_train_epochs", "nan"], "num_train_epochs is nan", "finite"),
        ([*REQUIRED, "--save_steps", "nan"], "save_steps is nan", "finite"),
        ([*REQUIRED, "--loss_impl", "x"], "invalid choice", "--help"),
        (["--model", "M", "--output_dir", "O"], "DIR is missing", "sftprep build"),
        (["DIR", "--output_dir", "O"], "model is missing", 'model="FOLDER_OR_NAME"'),
        (["DIR", "--model", "M"], "output_dir is missing", 'output_dir="DIR"'),
        (["A", "B", *REQUIRED[1:]], "A, B", "one DIR"),
        ([*REQUIRED, "--config"], "config has no file", 'config="FILE.yaml"'),
        ([*REQUIRED, "--config", "/nowhere.yaml"], "cannot read the config file", "path"),
    ],
)
def test_usage_errors_have_a_remedy(arguments: list[str], message: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_arguments(arguments)
    assert message in caught.value.message
    assert remedy in caught.value.remedy
    assert caught.value.exit_code == 2


def test_an_unknown_setting_in_a_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("learnin_rate: 3\n")
    with pytest.raises(ConfigError, match="unknown setting 'learnin_rate'") as caught:
        read_arguments([*REQUIRED, "--config", str(path)])
    assert "learning_rate" in caught.value.remedy


# ---- running ----


def test_a_run_leaves_a_model_and_a_summary(
    build: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(build, model, tmp_path, "--json", "--eval_data", str(build))) == 0
    printed = capsys.readouterr()
    summary = json.loads(printed.out)
    assert summary["steps"] == 4
    assert summary["last_loss"] < summary["first_loss"]
    assert summary["trained_tokens"] > 0
    assert (summary["kind"], summary["attention"], summary["loss_impl"], summary["unpacked"]) == (
        "model",
        "sft_varlen",
        "fused",
        False,
    )
    assert summary["evaluation"]["eval_loss"] > 0
    assert (tmp_path / "model.safetensors").exists()
    assert [line for line in printed.err.splitlines() if line.startswith("step 4/4  loss")]
    assert "Traceback" not in printed.err


def test_arguments_of_from_pretrained(
    build: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(more: str) -> int:
        return main(
            command(build, model, tmp_path / "out", "--max_steps", "1", "--model_init_kwargs", more)
        )

    assert run('{"torch_dtype": "bfloat16", "attn_implementation": "unpack"}') == 0
    assert "rows unpacked" in capsys.readouterr().err
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    )
    assert run('{"dtype": "float32", "torch_dtype": "bfloat16"}') == 2
    assert "which are the same" in capsys.readouterr().err
    assert run('{"no_such_option": 1}') == 2
    assert "model_init_kwargs" in capsys.readouterr().err
    assert run("bfloat16") == 2
    assert "is not a JSON object" in capsys.readouterr().err
    assert (
        main(
            command(
                build,
                model,
                tmp_path,
                "--use_peft",
                "--merge",
                "--model_init_kwargs",
                '{"dtype": "float32"}',
            )
        )
        == 2
    )
    assert "--model_revision" in capsys.readouterr().err


def test_a_finished_run_does_not_train_again(
    build: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(command(build, model, out, "--save_steps", "4", "--json")) == 0
    before = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    weights = (out / "model.safetensors").read_bytes()
    assert (
        main(
            command(
                build, model, out, "--save_steps", "4", "--json", "--resume_from_checkpoint", "true"
            )
        )
        == 0
    )
    after = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert (before["steps"], after["steps"]) == (4, 0)
    assert after["trained_tokens"] == before["trained_tokens"]
    assert (out / "model.safetensors").read_bytes() == weights


def test_an_output_folder_in_the_data_or_a_file_is_refused(
    build: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for out in (build, build / "out", build / ".." / build.name, tmp_path / "file"):
        assert main(command(build, model, out)) == 2
        assert f"output_dir {out}" in capsys.readouterr().err
    assert not (build / "out").exists()


def test_a_resumed_run_with_an_adapter_equals_an_uninterrupted_one(
    build: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel

    lora = ("--use_peft", "--lora_r", "4", "--save_steps", "2")
    straight, stopped = tmp_path / "a", tmp_path / "b"
    assert main(command(build, model, straight, *lora, "--json")) == 0
    # The schedule is of four steps in both: only the second run stops half way.
    assert main(command(build, model, stopped, *lora, "--json")) == 0
    for leftover in (stopped / "checkpoint-4").iterdir():
        leftover.unlink()
    assert (
        main(command(build, model, stopped, *lora, "--json", "--resume_from_checkpoint", "latest"))
        == 0
    )
    first, _, resumed = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert resumed["resumed_from"].endswith("checkpoint-2")
    assert (resumed["steps"], resumed["trained_tokens"], resumed["last_loss"]) == (
        2,
        first["trained_tokens"],
        first["last_loss"],
    )
    assert first["kind"] == "adapter"
    assert first["trained_parameters"] < first["parameters"]
    logits = []
    for folder in (straight, stopped):
        loaded = PeftModel.from_pretrained(tiny_model("llama"), str(folder)).eval()
        with torch.no_grad():
            logits.append(loaded(input_ids=torch.arange(3, 20)[None]).logits)
    assert torch.equal(*logits)


def test_text_summary(
    build: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(build, model, tmp_path)) == 0
    out = capsys.readouterr().out
    assert "4 steps in" in out
    assert "trained tokens" in out
    assert f"the model is in {tmp_path}" in out


@pytest.mark.parametrize(
    ("change", "message", "remedy"),
    [
        ({"build": "raw.jsonl"}, "raw records need a tokenizer", "processing_class"),
        ({"build": "empty"}, "not a finished build", "sftprep build"),
        ({"build": "nowhere"}, "does not exist", "sftprep build"),
        ({"model": "nowhere"}, "nowhere", "check the folder"),
        ({"more": ["--attn", "sdpa"]}, "attend to each other", "--attn auto"),
        ({"more": ["--attn", "flash_attention_2"]}, "CUDA", "--attn auto"),
        ({"more": ["--resume_from_checkpoint", "latest"]}, "no complete checkpoint", "without"),
        ({"more": ["--eval_strategy", "epoch"]}, "nothing to evaluate", "--eval_data"),
        ({"more": ["--optim", "nonsense"]}, "nonsense", "--help"),
        ({"more": ["--save_total_limit", "1", "--bad"]}, "unknown option --bad", ""),
    ],
)
def test_errors_have_a_message_a_remedy_and_an_exit_code(
    build: Path,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    message: str,
    remedy: str,
) -> None:
    (tmp_path / "raw.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "empty").mkdir()
    data = tmp_path / change["build"] if "build" in change else build
    wanted = tmp_path / change["model"] if "model" in change else model
    assert main(command(data, wanted, tmp_path / "out", *change.get("more", []))) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.strip().splitlines()
    told = [line for line in lines if line.startswith("error: ")]
    assert len(told) == 1
    assert message in told[0]
    assert remedy in lines[-1]
    assert "Traceback" not in printed.err


def test_debug_lets_errors_propagate(build: Path, tmp_path: Path) -> None:
    from sftprep.errors import InputNotFound

    with pytest.raises(InputNotFound):
        main(command(build, tmp_path / "nowhere", tmp_path / "out", "--debug"))


def test_shards_of_a_larger_vocabulary_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = write_build(
        tmp_path / "packs",
        make_packs(3, vocabulary=4000),
        tokenizer={"name": "", "fingerprint": ""},
    )
    assert main(command(foreign, model, tmp_path / "out")) == 2
    assert "embedding has 128 rows" in capsys.readouterr().err


def test_a_damaged_shard_is_an_error(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = write_build(
        tmp_path / "packs", make_packs(3), tokenizer={"name": "", "fingerprint": ""}
    )
    (shard,) = (damaged / "shards").rglob("*.arrow")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert main(command(damaged, model, tmp_path / "out")) == 1
    assert "is damaged" in capsys.readouterr().err


def test_no_command_and_unknown_commands() -> None:
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert main(["--version"]) == 0
    assert main(["trian"]) == 2


@pytest.mark.parametrize(
    ("step", "flag", "other"),
    [
        ("training_step", "--per_device_train_batch_size", "--per_device_eval_batch_size"),
        ("_evaluate_set", "--per_device_eval_batch_size", "--per_device_train_batch_size"),
    ],
)
def test_the_batch_size_that_needs_too_much_memory_is_named(
    step: str,
    flag: str,
    other: str,
    build: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(SFTTrainer, step, fail)
    flags = ("--max_steps", "1", "--eval_data", str(build), "--isolation_guard", "false")
    assert main(command(build, model, tmp_path / "out", *flags)) == 3
    error = capsys.readouterr().err
    assert f"lower {flag}" in error
    assert other not in error
