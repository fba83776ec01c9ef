"""A run is the same however its steps are split, and whether it is interrupted or not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from sftprep.errors import (
    ConfigError,
    InputNotFound,
    MismatchError,
    TokenizerError,
    TrainingDiverged,
)
from sfttrain import SFTConfig, SFTTrainer
from sfttrain.checkpoints.select import RunState, find_checkpoint
from tests.sfttrain.packs import MemoryPacks, make_pack, make_packs, split
from tests.sfttrain.tiny import tiny_model

PACKS = make_packs(12)


def trainer_for(
    folder: Path, *, packs: Any = PACKS, model: Any = None, **settings: Any
) -> SFTTrainer:
    """Create a trainer of a tiny Llama that logs every step."""
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    extra = {
        name: settings.pop(name) for name in ("eval_dataset", "peft_config") if name in settings
    }
    return SFTTrainer(
        model or tiny_model("llama"),
        SFTConfig(**{**options, **settings}),
        train_dataset=packs,
        **extra,
    )


def losses(trainer: SFTTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_run(one: SFTTrainer, other: SFTTrainer, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(losses(one), losses(other), rtol=tolerance)
    theirs = weights(other.model)
    for name, value in weights(one.model).items():
        torch.testing.assert_close(
            value, theirs[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    "settings", [{"attn": "unpack"}, {"loss_impl": "logits"}, {"gradient_checkpointing": True}]
)
def test_the_computation_of_a_step_does_not_change_the_run(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    # SGD: Adam divides a gradient by its own size, and would make a rounding error of a zero
    # gradient a whole step.
    plain, other = (
        trainer_for(tmp_path, optim="sgd", **s) for s in ({"loss_impl": "fused"}, settings)
    )
    plain.train()
    other.train()
    assert_same_run(plain, other)


@pytest.mark.parametrize(("rows", "accumulation"), [(4, 1), (2, 2), (1, 4)])
def test_a_step_is_one_step_however_it_is_split_into_micro_batches(
    tmp_path: Path, rows: int, accumulation: int
) -> None:
    """The packs have different numbers of trained tokens, so a mean of means would differ."""
    packs = MemoryPacks(
        [make_pack([30], seed=n, trained=t) for n, t in enumerate([1.0, 0.1, 0.5, 0.05] * 3)]
    )
    whole = trainer_for(tmp_path, packs=packs, optim="sgd", per_device_train_batch_size=4)
    split_up = trainer_for(
        tmp_path,
        packs=packs,
        optim="sgd",
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
    )
    whole.train()
    split_up.train()
    assert_same_run(whole, split_up)


def test_a_pack_trains_like_its_sequences_in_separate_packs(tmp_path: Path) -> None:
    pack = make_pack([5, 9, 1, 7])
    packed = trainer_for(
        tmp_path, packs=MemoryPacks([pack]), optim="sgd", per_device_train_batch_size=1
    )
    apart = trainer_for(
        tmp_path, packs=MemoryPacks(split(pack)), optim="sgd", per_device_train_batch_size=4
    )
    packed.train()
    apart.train()
    assert_same_run(packed, apart)


def test_logs_have_the_trained_tokens_and_accuracy(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    targets = [int((p.completion_mask & (positions(p) > 0)).sum()) for p in PACKS.packs]
    assert len(logs) == 6
    assert logs[-1]["num_tokens"] == sum(targets) == trainer.trained_tokens
    assert all(
        0 <= entry["mean_token_accuracy"] <= 1 and entry["tokens_per_second"] > 0 for entry in logs
    )
    assert logs[-1]["loss"] < logs[0]["loss"]


def positions(pack: Any) -> Any:
    return np.concatenate([np.arange(n) for n in pack.seq_lengths])


def test_a_step_in_which_nothing_is_trained_changes_nothing(tmp_path: Path) -> None:
    packs = MemoryPacks([make_pack([4, 6], seed=n, trained=0.0) for n in range(4)])
    trainer = trainer_for(tmp_path, packs=packs, max_steps=2)
    before = weights(trainer.model)
    trainer.train()
    assert losses(trainer) == [0.0, 0.0]
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer.model).items())


def test_a_model_that_is_not_finite_is_not_trained(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    with torch.no_grad():
        trainer.model.model.norm.weight[0] = math.nan
    with pytest.raises(TrainingDiverged, match="not finite before training") as caught:
        trainer.train()
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("model", ["llama", "mamba"])
def test_evaluation_counts_every_trained_position_once(tmp_path: Path, model: str) -> None:
    kept = tiny_model(model)
    trainer = trainer_for(
        tmp_path, model=tiny_model(model), eval_dataset=PACKS, per_device_eval_batch_size=5
    )
    metrics = trainer.evaluate()
    total, correct, count = 0.0, 0, 0
    for pack in PACKS.packs:
        for piece in split(pack):
            ids = torch.from_numpy(piece.input_ids.astype(np.int64))
            with torch.no_grad():
                logits = kept(input_ids=ids[None], use_cache=False).logits[0].double()
            for at in range(1, len(ids)):
                if piece.completion_mask[at]:
                    total -= float(torch.log_softmax(logits[at - 1], -1)[ids[at]])
                    correct += int(logits[at - 1].argmax()) == int(ids[at])
                    count += 1
    assert metrics["eval_num_tokens"] == count
    assert metrics["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert metrics["eval_mean_token_accuracy"] == pytest.approx(correct / count)


def test_several_evaluation_sets_have_a_loss_each_and_evaluating_again_gives_the_same(
    tmp_path: Path,
) -> None:
    sets = {"a": make_packs(3, seed=1), "b": make_packs(4, seed=2)}
    trainer = trainer_for(tmp_path, eval_dataset=sets)
    first = trainer.evaluate()
    assert first["eval_a_loss"] != first["eval_b_loss"]
    assert trainer.evaluate(sets["b"])["eval_loss"] == first["eval_b_loss"]
    assert trainer.evaluate({"b": sets["b"]})["eval_b_loss"] == first["eval_b_loss"]


def test_an_evaluation_does_not_change_the_training(tmp_path: Path) -> None:
    with_eval = trainer_for(
        tmp_path, eval_dataset=make_packs(3, seed=1), eval_strategy="steps", eval_steps=2
    )
    without = trainer_for(tmp_path)
    with_eval.train()
    without.train()
    assert losses(with_eval) == losses(without)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, stop: int, adapter: bool
) -> None:
    """It resumes in mid-epoch, in the second epoch, with dropout, and with its token counter."""

    def make(folder: Path) -> SFTTrainer:
        torch.manual_seed(0)
        lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=0.1)
        return trainer_for(
            folder,
            model=tiny_model("llama", attention_dropout=0.1),
            gradient_accumulation_steps=2,
            peft_config=lora if adapter else None,
            save_strategy="steps",
            save_steps=1,
        )

    straight = make(tmp_path / "straight")
    straight.train()
    resumed = make(tmp_path / "other")
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{stop}"))
    assert losses(resumed) == losses(straight)
    assert resumed.trained_tokens == straight.trained_tokens
    theirs = weights(straight.model)
    assert all(torch.equal(value, theirs[name]) for name, value in weights(resumed.model).items())


def test_resuming_another_run_is_refused(tmp_path: Path) -> None:
    trainer_for(tmp_path, save_strategy="steps", save_steps=3).train()
    for settings, remedy in (
        ({"per_device_train_batch_size": 3}, "keep per_device"),
        ({"seed": 7}, "seed=42"),
    ):
        with pytest.raises(MismatchError) as caught:
            trainer_for(tmp_path, **settings).train(resume_from_checkpoint=True)
        assert remedy in caught.value.remedy
    with pytest.raises(MismatchError, match=r"on other data .* b, but .* /two .* a\n"):
        RunState("a", 1, 1, build="/two").reject_other_run(RunState("b", 1, 1), "x")


def test_the_newest_complete_checkpoint_is_found(tmp_path: Path) -> None:
    trainer_for(tmp_path, save_strategy="steps", save_steps=2).train()
    assert find_checkpoint("latest", str(tmp_path)).endswith("checkpoint-6")
    (tmp_path / "checkpoint-6" / "optimizer.pt").unlink()
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text('{"epoch": ')
    assert find_checkpoint(True, str(tmp_path)).endswith("checkpoint-2")
    with pytest.raises(ConfigError, match=r"optimizer\.pt is missing"):
        find_checkpoint(str(tmp_path / "checkpoint-6"), str(tmp_path))
    with pytest.raises(InputNotFound):
        find_checkpoint(str(tmp_path / "checkpoint-9"), str(tmp_path))
    with pytest.raises(InputNotFound, match="no complete checkpoint"):
        find_checkpoint("latest", str(tmp_path / "elsewhere"))


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}]
)
def test_an_adapter_is_saved_and_loads_in_plain_peft(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", **options)
    trainer = trainer_for(tmp_path, peft_config=lora)
    base = {
        n: v
        for n, v in weights(trainer.model).items()
        if "lora" not in n and "modules_to_save" not in n and "magnitude" not in n
    }
    trainer.train()
    trainer.save_model()
    trained = weights(trainer.model)
    assert all(torch.equal(trained[name], value) for name, value in base.items())
    ids = torch.arange(3, 20)[None]
    trainer.model.eval()
    loaded = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path)).eval()
    with torch.no_grad():
        found, wanted = loaded(input_ids=ids).logits, trainer.model(input_ids=ids).logits
        untrained = tiny_model("llama")(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, untrained, atol=1e-3)


def test_a_fully_trained_model_is_saved_and_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    trainer = trainer_for(tmp_path)
    trainer.train()
    trainer.save_model()
    ids = torch.arange(3, 20)[None]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(input_ids=ids).logits,
            trainer.model.eval()(input_ids=ids).logits,
            rtol=1e-5,
            atol=1e-5,
        )
    assert "lm_head.weight" in load_file(tmp_path / "model.safetensors")


def test_the_token_for_the_hub_is_not_saved(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, hub_token="hf_canary", save_strategy="steps", save_steps=3)
    trainer.train()
    trainer.save_model()
    assert trainer.args.hub_token == "hf_canary"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in files)
    assert not [path for path in files if b"hf_canary" in path.read_bytes()]


def test_noise_on_embeddings_has_the_size_of_each_sequence(tmp_path: Path) -> None:
    """It is the same for three sequences in one row and in three, and is off after training."""
    from sfttrain.data.batching import collate_packs
    from sfttrain.packed.forward import packed_arguments
    from sfttrain.packed.neftune import noise_by_sequence

    trainer = trainer_for(tmp_path, neftune_noise_alpha=5.0)
    model, seen = trainer.model, []
    handle = model.model.layers[0].register_forward_pre_hook(
        lambda module, args: seen.append(args[0].detach())
    )
    pack = make_pack([4, 16, 36])
    row = collate_packs([pack])
    model.train()
    with noise_by_sequence(model, 5.0):
        for _ in range(200):
            model(**packed_arguments(row, trainer.feeding))
    handle.remove()
    noise = torch.stack(seen) - model.get_input_embeddings().weight.detach()[row["input_ids"]]
    for part, length in zip(noise.split([4, 16, 36], 2), (4, 16, 36), strict=True):
        largest = 5.0 / math.sqrt(length * 32)
        assert part.abs().max() <= largest * 1.0001
        assert part.std().item() == pytest.approx(largest / math.sqrt(3), rel=0.05)
    trainer.train()
    assert not model.get_input_embeddings()._forward_hooks


def test_noise_on_embeddings_acts_in_training_only(tmp_path: Path) -> None:
    noisy = trainer_for(tmp_path, neftune_noise_alpha=5.0, eval_dataset=PACKS)
    quiet = trainer_for(tmp_path, eval_dataset=PACKS)
    assert noisy.evaluate()["eval_loss"] == quiet.evaluate()["eval_loss"]
    noisy.train()
    quiet.train()
    assert losses(noisy)[0] != losses(quiet)[0]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"label_smoothing_factor": 0.1}, "label smoothing"),
        ({"use_liger_kernel": True}, "liger"),
        ({"loss_impl": "x"}, "loss_impl"),
    ],
)
def test_unsupported_arguments_are_refused_by_name(
    tmp_path: Path, settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        trainer_for(tmp_path, **settings)


def test_raw_records_need_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="made from a config") as caught:
        trainer_for(tmp_path, packs=[{"text": "a"}])
    assert "processing_class" in caught.value.remedy
