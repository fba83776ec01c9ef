"""Several processes become one run or are refused: never several runs that write to one folder."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sftprep.errors import ConfigError, OutputBusy
from sfttrain import SFTConfig
from sfttrain.cli.main import main
from sfttrain.config.launchers import LAUNCHERS, launched_ranks, unmet_launch
from tests.preloaded_python import run_python
from tests.sfttrain.builds import write_build
from tests.sfttrain.packs import make_packs
from tests.sfttrain.test_trainer import trainer_for
from tests.sfttrain.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[2]
on_cpu = pytest.mark.skipif(torch.accelerator.is_available(), reason="ranks get devices here")


@on_cpu
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
def test_torchrun_on_a_cpu_makes_one_run_without_use_cpu(tmp_path: Path) -> None:
    write_build(tmp_path / "packs", make_packs(8), tokenizer={"name": "", "fingerprint": ""})
    tiny_model("llama").save_pretrained(tmp_path / "model")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", "2", "-m", "sfttrain", "run", str(tmp_path / "packs")),
            *("--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "o")),
            *("--max_steps", "2", "--logging_steps", "1", "--save_steps", "1", "--json"),
            *("--per_device_train_batch_size", "1"),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("step 1/2") == 1
    assert len(done.stdout.strip().splitlines()) == 1
    assert json.loads(done.stdout)["steps"] == 2
    state = json.loads((tmp_path / "o" / "checkpoint-1" / "sft_state.json").read_text())
    assert state["packs_per_step"] == state["ranks"] == 2
    assert sorted(p.name for p in (tmp_path / "o" / "checkpoint-1").glob("rng_state*")) == [
        "rng_state_0.pth",
        "rng_state_1.pth",
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WORLD_SIZE", " 2 "),
        ("OMPI_COMM_WORLD_SIZE", "2"),
        ("PMI_SIZE", "2"),
        ("SLURM_STEP_NUM_TASKS", "2"),
        ("PMIX_RANK", "1"),
    ],
)
def test_ranks_that_do_not_become_one_run_are_refused(
    tmp_path: Path, name: str, value: str
) -> None:
    """This happens under mpirun on a machine with GPUs, where accelerate ignores the ranks."""
    code = (
        "import sys, torch\n"
        "torch.accelerator.is_available = lambda: True\n"
        "from sfttrain import SFTConfig\n"
        "try:\n"
        "    SFTConfig(output_dir=sys.argv[1], bf16=False)\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    done = run_python("-c", code, str(tmp_path), env={**os.environ, name: value})
    assert "ConfigError 2 processes were launched, and each would train by itself" in done.stdout
    assert f"unset {name}" in done.stdout
    assert list(tmp_path.iterdir()) == []


@on_cpu
@pytest.mark.parametrize(
    "variables",
    [
        {"PMI_SIZE": "2", "PMI_RANK": "1"},
        {"OMPI_COMM_WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2", "RANK": "0"},
        {"LOCAL_RANK": "1"},
        {"SLURM_STEP_NUM_TASKS": "2"},
    ],
)
def test_ranks_that_cannot_find_each_other_are_refused_on_a_cpu_too(
    tmp_path: Path, variables: dict[str, str]
) -> None:
    """Without our check, accelerate and torch would complain about a missing variable."""
    arguments = ["run", "packs", "--model", "model", "--output_dir", str(tmp_path / "o")]
    launchers = {name for names in LAUNCHERS for name in names}
    clean = {name: value for name, value in os.environ.items() if name not in launchers}
    done = run_python("-m", "sfttrain", *arguments, env={**clean, **variables})
    assert done.returncode == 2
    assert "processes were launched, and each would train by itself" in done.stderr
    assert f"unset {', '.join(name for name in variables if name != 'RANK')}"[:-2] in done.stderr
    assert list(tmp_path.iterdir()) == []


@on_cpu
@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
        {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"},
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
        {"PMI_SIZE": "2", "PMI_RANK": "0"},
    ],
)
def test_a_process_that_waits_for_others_says_so_and_gives_up(
    tmp_path: Path, variables: dict[str, str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launchers = {name for names in LAUNCHERS for name in names}
    clean = {name: value for name, value in os.environ.items() if name not in launchers}
    done = run_python(
        *("-m", "sfttrain", "run", "packs", "--model", "model"),
        *("--output_dir", str(tmp_path / "o"), "--ddp_timeout", "2"),
        env={**clean, **variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
    )
    assert done.returncode == 3, done.stderr
    line = f"waiting for the other 1 of 2 processes at 127.0.0.1:{port}\n"
    assert done.stderr.count(line) == 1
    assert "the 2 processes of this run did not find each other within 2 s" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_empty_variables_of_launchers_count_as_unset(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"):
        environment.setenv(name, "")
    assert SFTConfig(output_dir=str(tmp_path), use_cpu=True).world_size == 1


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Remove the variables of launchers from the environment."""
    for names in LAUNCHERS:
        for name in filter(None, names):
            monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [
        ({}, 1),
        ({"WORLD_SIZE": " 2 "}, 2),
        ({"WORLD_SIZE": "1", "PMI_SIZE": ""}, 1),
        ({"RANK": "3"}, 1),
        ({"PMI_SIZE": "4", "PMI_RANK": "0"}, 4),
        ({"PMIX_RANK": "1", "PMIX_NAMESPACE": "x"}, 2),
        ({"PMIX_RANK": "0", "PMIX_NAMESPACE": "x"}, 1),
        ({"PMIX_RANK": "0", "PMIX_SIZE": "3"}, 3),
        ({"MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "0"}, 2),
        ({"PALS_RANKID": "0", "PALS_LOCAL_SIZE": "2"}, 2),
        ({"PALS_RANKID": "1", "PALS_LOCAL_SIZE": "1"}, 2),
        ({"JSM_NAMESPACE_SIZE": "2", "JSM_NAMESPACE_RANK": "1"}, 2),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, 2),
        # A batch script, and a shell that salloc started: one process, whatever was allocated.
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, 1),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, 1),
    ],
)
def test_launchers_are_recognized_by_their_environment(
    environment: pytest.MonkeyPatch, variables: dict[str, str], ranks: int
) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    assert launched_ranks() == ranks


@pytest.mark.parametrize("rank", [1, 5])
def test_a_rank_that_does_not_exist_is_refused(environment: pytest.MonkeyPatch, rank: int) -> None:
    """torch would wait without an end for processes that nobody starts."""
    variables = {"RANK": str(rank), "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**variables, "MASTER_PORT": "29871", "LOCAL_RANK": "0"}.items():
        environment.setenv(name, value)
    with pytest.raises(ConfigError, match=f"RANK is {rank} and WORLD_SIZE is 1"):
        unmet_launch("out")


@pytest.mark.parametrize("name", ["WORLD_SIZE", "PMI_SIZE", "PMIX_RANK"])
def test_a_number_of_processes_that_is_not_a_number_is_refused(
    environment: pytest.MonkeyPatch, name: str
) -> None:
    environment.setenv(name, "many")
    with pytest.raises(ConfigError, match=f"the environment variable {name} is 'many'"):
        launched_ranks()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("WORLD_SIZE", "9" * 20), ("RANK", str(1 << 31))],
        *(("MASTER_PORT", port) for port in ("x", "-1", "65536", "1.5")),
    ],
)
def test_numbers_that_torch_cannot_use_are_refused(
    environment: pytest.MonkeyPatch, name: str, value: str
) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29871"}
    for each, number in {**variables, name: value}.items():
        environment.setenv(each, number)
    with pytest.raises(ConfigError, match=f"the environment variable {name} is '{value}'"):
        unmet_launch("out")


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path, capsys: Any) -> None:
    """It is refused even if it is not a rank of the same launch."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.sfttrain.test_trainer import trainer_for\n"
        "try:\n"
        "    trainer_for(Path(sys.argv[1])).train()\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    first = trainer_for(tmp_path)
    with first.output_held():
        done = run_python("-c", code, str(tmp_path))
    assert f"OutputBusy another run (process {os.getpid()} of" in done.stdout, done.stderr
    with first.output_held(), pytest.raises(OutputBusy):
        trainer_for(tmp_path).train()
    # One after the other may.
    for _ in range(2):
        trainer_for(tmp_path).train()
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_locked_until_the_command_has_written_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """It is locked while the final model is saved, evaluated and merged as well."""
    from sfttrain.cli import run as run_module
    from sfttrain.trainer import SFTTrainer

    write_build(tmp_path / "packs", make_packs(8), tokenizer={"name": "", "fingerprint": ""})
    tiny_model("llama").save_pretrained(tmp_path / "model")
    held: dict[str, bool] = {}

    def watched(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*given: Any, **options: Any) -> Any:
            held[name] = (tmp_path / "o" / ".sfttrain-lock").exists()
            return real(*given, **options)

        monkeypatch.setattr(owner, name, call)

    watched(run_module, "merge_adapter")
    for name in ("train", "save_model", "save_state", "evaluate"):
        watched(SFTTrainer, name)
    arguments = [
        *("run", str(tmp_path / "packs"), "--model", str(tmp_path / "model"), "--use_cpu"),
        *("--eval_data", str(tmp_path / "packs"), "--output_dir", str(tmp_path / "o")),
        *("--max_steps", "1", "--use_peft", "--merge"),
    ]
    assert main(arguments) == 0, capsys.readouterr().err
    assert held == dict.fromkeys(
        ("train", "save_model", "save_state", "evaluate", "merge_adapter"), True
    )
    assert not (tmp_path / "o" / ".sfttrain-lock").exists()


@pytest.mark.parametrize("url", ["s3://bucket/x", "S3://b/x.jinja", "gs:/b"])
@pytest.mark.parametrize(
    "setting", ["--output_dir", "--dataset_cache_dir", "--chat_template_path", "--model"]
)
def test_urls_are_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, setting: str, url: str
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = {"--model": "model", "--output_dir": "o", setting: url}
    arguments = [part for pair in paths.items() for part in pair]
    assert main(["run", "packs", *arguments, "--use_cpu"]) == 2
    assert "URLs are not supported" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_unknown_urls_as_data_are_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, tokenizer_dir: Path
) -> None:
    from tests.sfttrain.trainer_factory import model_folder

    model = model_folder(tmp_path / "model", tokenizer_dir)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for data in (
        *(["s4://b/x.jsonl"], ["file:///b/x"], ["--stream", "s4://b/x.jsonl"]),
        *(
            ["--stream", "s3:/b/x.jsonl"],
            ["--dataset_name", "S4://b/x"],
            ["--dataset_name", "s3:b"],
        ),
    ):
        arguments = ["--model", str(model), "--output_dir", "o", "--use_cpu", "--max_steps", "1"]
        assert main(["run", *data, *arguments]) == 2
        assert "not supported" in capsys.readouterr().err
        assert list((tmp_path / "work").iterdir()) == []


def test_an_output_folder_in_the_data_is_refused(
    tmp_path: Path, capsys: Any, tokenizer_dir: Path
) -> None:
    """The next run would read checkpoints as records."""
    from tests.sfttrain.trainer_factory import model_folder

    model = model_folder(tmp_path / "model", tokenizer_dir)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text('{"text": "a b c"}\n')
    arguments = ["run", str(tmp_path / "data"), "--model", str(model), "--use_cpu"]
    assert main([*arguments, "--output_dir", str(tmp_path / "data" / "out")]) == 2
    assert "is in the data" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["a.jsonl"]
