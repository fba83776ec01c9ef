"""The conversion to GPTQ format: what it calibrates on, and the model that it writes."""

from __future__ import annotations

import runpy
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import sftprep
from tests.conftest import EXAMPLES
from tests.sfttrain.tiny import tiny_model

SCRIPT = runpy.run_path(str(EXAMPLES / "seed_page" / "gptq.py"))


@pytest.fixture(scope="module")
def shards(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "packs"
    sftprep.build(
        str(EXAMPLES / "data" / "chats.jsonl"),
        tokenizer=str(tokenizer_dir),
        output=str(folder),
        train_on="assistant",
        max_length=256,
        limit=30,
        eval_fraction=0.2,
        workers=1,
    )
    return folder


@pytest.fixture(scope="module")
def adapter(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an adapter with random weights, whose base model is next to it."""
    folder = tmp_path_factory.mktemp("adapter")
    sizes = {"vocab_size": 600, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    model = tiny_model("llama", **sizes, max_position_embeddings=256)
    model.save_pretrained(folder / "base")
    model.name_or_path = str(folder / "base")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        base_model_name_or_path=str(folder / "base"),
    )
    adapted = get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.02)
    adapted.save_pretrained(folder / "adapter")
    shutil.copytree(tokenizer_dir, folder / "adapter", dirs_exist_ok=True)
    return folder / "adapter"


def trained_counts(chosen: list[Any]) -> list[int]:
    return [int(mask.sum()) for _, mask in chosen]


def test_the_calibration_has_the_sequences_with_the_most_trained_tokens(shards: Path) -> None:
    build = sftprep.open_shards(shards)
    chosen, held_out = SCRIPT["choose_sequences"](build, 5, 100)
    everything = sorted(trained_counts(list(SCRIPT["sequences"](build, 100))), reverse=True)
    assert trained_counts(chosen) == everything[:5]
    assert all(len(ids) == len(mask) <= 100 for ids, mask in chosen)
    # The loss is measured on the evaluation build.
    evaluation = sftprep.open_shards(shards / "eval")
    first = next(SCRIPT["sequences"](evaluation, 100))
    assert np.array_equal(held_out[0][0], first[0])


def test_without_an_evaluation_build_the_loss_is_measured_on_other_sequences(shards: Path) -> None:
    build = sftprep.open_shards(shards / "eval")  # a build that has none itself
    chosen, held_out = SCRIPT["choose_sequences"](build, 2, 64)
    assert chosen
    assert held_out
    assert not {ids.tobytes() for ids, _ in chosen} & {ids.tobytes() for ids, _ in held_out}


def test_the_measured_loss_is_that_of_transformers(adapter: Path, shards: Path) -> None:
    model = SCRIPT["merge"](str(adapter))
    (ids, mask), *_ = SCRIPT["choose_sequences"](sftprep.open_shards(shards), 1, 100)[0]
    labels = torch.from_numpy(np.where(mask, ids, -100).astype(np.int64))[None]
    with torch.no_grad():
        expected = model(torch.from_numpy(ids.astype(np.int64))[None], labels=labels).loss.item()
    assert SCRIPT["mean_loss"](model, [(ids, mask)]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.skipif(find_spec("auto_round") is not None, reason="auto-round is installed")
def test_the_script_names_the_missing_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        SCRIPT["main"]([])
    assert caught.value.code == 0
    assert 'pip install "auto-round' in capsys.readouterr().out


@pytest.mark.skipif(find_spec("auto_round") is None, reason="auto-round is not installed")
@pytest.mark.filterwarnings("ignore")
def test_the_result_is_in_gptq_format_and_has_nearly_the_same_loss(
    adapter: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--adapter", str(adapter), "--shards", str(shards), "--output", str(tmp_path)]
    SCRIPT["main"]([*options, "--samples", "8", "--length", "64", "--iters", "5"])
    line = capsys.readouterr().out.splitlines()[-1]
    before, after = (float(text) for text in line.split(": ")[1].split(",")[0].split(" -> "))
    assert after == pytest.approx(before, rel=0.05)
    # The weights, unpacked as the format describes them, are those of the merged model.
    (file,) = tmp_path.rglob("model.safetensors")
    tensors = load_file(file)
    merged = SCRIPT["merge"](str(adapter))
    for name, module in merged.named_modules():
        if f"{name}.qweight" in tensors:
            difference = unpack(tensors, name) - module.weight.detach()
            assert difference.norm() < 0.25 * module.weight.norm(), name
    assert sum(name.endswith(".qweight") for name in tensors) == 2 * 7


def unpack(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Return the weight [out, in] of a layer in GPTQ format with 4 bits."""
    packed, zeros = tensors[f"{name}.qweight"], tensors[f"{name}.qzeros"]
    shifts = torch.arange(0, 32, 4)
    values = (packed[:, None, :] >> shifts[None, :, None] & 15).flatten(0, 1)  # [in, out]
    zero_points = (zeros[:, :, None] >> shifts & 15).flatten(1) + 1  # [groups, out]
    group = tensors[f"{name}.g_idx"].long()
    return (tensors[f"{name}.scales"].float()[group] * (values - zero_points[group])).T
