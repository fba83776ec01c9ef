"""The snippets of TRL's SFT page run with one import changed, on tiny models."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "examples" / "seed_page"
NAMES = sorted(path.stem for path in SCRIPTS.glob("*.py") if path.stem != "make_models")

# Scripts that need the output of another script, and scripts that need an optional package.
AFTER = {"continue_adapter": "lora", "gptq": "lora"}
# Scripts that are not a snippet of the page.
OWN = ("vlm_collator", "gptq")
NEEDS = {"lora_8bit": "bitsandbytes", "vlm_collator": "PIL"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the models and data that the scripts name."""
    import datasets

    folder = tmp_path_factory.mktemp("workplace")
    (folder / "examples").symlink_to(ROOT / "examples")
    runpy.run_path(str(SCRIPTS / "make_models.py"))["main"](folder / "demo")
    before, datasets.config.HF_DATASETS_CACHE = (
        datasets.config.HF_DATASETS_CACHE,
        str(folder / "cache"),
    )
    yield folder
    datasets.config.HF_DATASETS_CACHE = before


def run(name: str) -> None:
    try:
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise


@pytest.mark.parametrize("name", NAMES)
def test_the_script_runs(
    name: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(sys, "argv", [name])
    if (
        name in AFTER
        and not (workplace / "demo" / "Qwen2.5-0.5B-SFT" / "adapter_config.json").exists()
    ):
        run(AFTER[name])
    run(name)
    printed = capsys.readouterr().out
    refused = {
        "liger": "needs a GPU",
        "unsloth_model": "not installed",
        "flash_attention": "refused, as it should be",
        "gptq": "loss of" if importlib.util.find_spec("auto_round") else "not installed",
    }
    assert (
        "train_loss" in printed
        or refused.get(name, "no such text") in printed
        or name == "unsloth_model"
    )


@pytest.mark.slow
def test_a_script_runs_under_accelerate_launch(workplace: Path) -> None:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(workplace / "hf"),
    }
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
    ]
    options = ["--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [sys.executable, *launch, *options, str(SCRIPTS / "multi_gpu.py")]
    done = subprocess.run(
        command,
        cwd=workplace,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "rank 0 of 1: losses [" in done.stdout


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OWN])
def test_only_the_import_differs_from_a_script_of_trl(name: str) -> None:
    """A script imports only names that TRL has too, so a script of TRL needs no other change."""
    text = (SCRIPTS / f"{name}.py").read_text(encoding="utf-8")
    ours = re.findall(
        r"^(?:from (sf\w+)(?:\.\w+)* import|import (sf\w+))", text, flags=re.MULTILINE
    )
    assert ours == [("sfttrain", "")]
    names = {
        alias.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and node.module == "sfttrain"
        for alias in node.names
    }
    known = {"SFTConfig", "SFTTrainer", "ModelConfig", "clone_chat_template"}
    known |= {"get_kbit_device_map", "get_peft_config", "get_quantization_config"}
    assert names
    assert names <= known
