"""Token weights: the loss is the weighted mean of a step, however the step is divided."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sftprep
from sfttrain.data.batching import collate_packs
from sfttrain.losses.fused_cross_entropy import plan_loss
from sfttrain.packed.attention import resolve_attention
from sfttrain.packed.forward import scored_outputs
from tests.preloaded_python import run_python, run_ranks
from tests.sfttrain.packs import MemoryPack, MemoryPacks, make_pack, split
from tests.sfttrain.test_trainer import assert_same_run, losses, trainer_for
from tests.sfttrain.tiny import tiny_model


def weigh(pack: MemoryPack, seed: int = 0) -> MemoryPack:
    """Return the pack with weights that differ from token to token; some are 0."""
    weights = (
        np.random.default_rng(seed)
        .choice([0.0, 0.1, 0.5, 1.0, 3.0], len(pack.input_ids))
        .astype(np.float32)
    )
    return MemoryPack(pack.input_ids, pack.completion_mask, pack.seq_lengths, weights)


def mean_alone(model: Any, packs: list[MemoryPack]) -> torch.Tensor:
    """Return sum(w * nll) / sum(w) over the trained tokens, computed token by token."""
    total, weight = torch.zeros((), dtype=torch.float64), 0.0
    for piece in (piece for pack in packs for piece in split(pack)):
        ids = torch.from_numpy(piece.input_ids.astype(np.int64))
        logits = model(input_ids=ids[None], use_cache=False).logits[0].double()
        for k in range(1, len(ids)):
            if piece.completion_mask[k]:
                w = 1.0 if piece.loss_weights is None else float(piece.loss_weights[k])
                total = total - w * torch.log_softmax(logits[k - 1], -1)[ids[k]]
                weight += w
    return total / weight


@pytest.mark.parametrize("kind", ["llama", "opt", "mamba"])
@pytest.mark.parametrize("loss_impl", ["logits", "fused"])
def test_loss_and_gradients_equal_those_of_the_weighted_mean(kind: str, loss_impl: str) -> None:
    model, packs = tiny_model(kind), [weigh(make_pack([7, 1, 13, 3])), make_pack([5, 8], seed=1)]
    wanted = mean_alone(model, packs)
    wanted.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    mode = resolve_attention(model, "auto", longest=13)
    batch, plan = collate_packs(packs), plan_loss(model, loss_impl, "nll")
    with plan.outputs_are_hidden():
        scored = scored_outputs(model, batch, mode)
    sums = plan.sums(*scored)
    assert sums.weight.item() == pytest.approx(batch["total_weight"], rel=1e-6)
    (sums.loss / sums.weight).backward()
    assert (sums.loss / sums.weight).item() == pytest.approx(wanted.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        if gradients[name] is not None:
            torch.testing.assert_close(
                parameter.grad,
                gradients[name],
                rtol=1e-4,
                atol=1e-6,
                msg=lambda m, n=name: f"{n}: {m}",
            )


def test_a_token_of_weight_0_is_not_trained() -> None:
    pack = weigh(make_pack([9, 6, 12]))
    assert pack.loss_weights is not None
    masked = MemoryPack(
        pack.input_ids,
        pack.completion_mask & (pack.loss_weights != 0),
        pack.seq_lengths,
        pack.loss_weights,
    )
    found, wanted = collate_packs([pack]), collate_packs([masked])
    for name in ("labels", "scored", "targets", "weights"):
        assert torch.equal(found[name], wanted[name])  # type: ignore[literal-required]
    nothing = MemoryPack(
        pack.input_ids, pack.completion_mask, pack.seq_lengths, np.zeros_like(pack.loss_weights)
    )
    assert collate_packs([nothing])["total_weight"] == 0
    assert collate_packs([nothing])["targets"].tolist() == [-100]


WEIGHTED = MemoryPacks(
    [
        weigh(make_pack([5, 1, 9, 4], seed=n, trained=t), n)
        for n, t in enumerate([1.0, 0.1, 0.5, 0.05] * 3)
    ]
)


@pytest.mark.parametrize(("rows", "accumulation"), [(2, 2), (1, 4)])
def test_the_division_of_a_weighted_step_does_not_change_it(
    tmp_path: Path, rows: int, accumulation: int
) -> None:
    settings: dict[str, Any] = {"packs": WEIGHTED, "optim": "sgd"}
    whole = trainer_for(tmp_path, per_device_train_batch_size=4, **settings)
    parts = trainer_for(
        tmp_path,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        **settings,
    )
    unpacked = trainer_for(tmp_path, per_device_train_batch_size=4, attn="unpack", **settings)
    first = mean_alone(tiny_model("llama"), [WEIGHTED[n] for n in whole.step_plan().order(0)[:4]])
    for trainer in (whole, parts, unpacked):
        trainer.train()
    assert losses(whole)[0] == pytest.approx(first.item(), rel=1e-6)
    assert_same_run(whole, parts, 1e-6)
    assert_same_run(whole, unpacked, 1e-6)


def test_equal_weights_give_the_run_without_weights(tmp_path: Path) -> None:
    packs = [make_pack([5, 9, 4], seed=n) for n in range(6)]
    quarter = [
        MemoryPack(p.input_ids, p.completion_mask, p.seq_lengths, np.full(18, 0.25, np.float32))
        for p in packs
    ]
    plain, weighted = (
        trainer_for(tmp_path, packs=MemoryPacks(p), optim="sgd") for p in (packs, quarter)
    )
    plain.train()
    weighted.train()
    assert_same_run(plain, weighted, 1e-6)
    assert plain.trained_tokens == weighted.trained_tokens


def test_weights_of_records_reach_the_loss(tmp_path: Path, tokenizer_dir: Path) -> None:
    """From loss_weight of messages, through a build, to the step."""
    turns = [
        {"role": "user", "content": "What is up?"},
        {"role": "assistant", "content": "The sky.", "loss_weight": 0.5},
    ]
    turns += [
        {"role": "user", "content": "And then?"},
        {"role": "assistant", "content": "The sun and the moon.", "loss_weight": 3},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": turns}) + "\n")
    settings: dict[str, Any] = {
        "inputs": str(path),
        "tokenizer": str(tokenizer_dir),
        "train_on": "assistant",
    }
    sftprep.build(sftprep.BuildConfig.of(output=str(tmp_path / "packs"), **settings))
    packs = sftprep.open_shards(tmp_path / "packs")
    batch = collate_packs([packs[0]])
    assert batch["weights"] is not None
    assert set(batch["weights"].tolist()) == {0.5, 3.0}
    model = tiny_model("llama", vocab_size=600, max_position_embeddings=128)
    pack = MemoryPack(
        packs[0].input_ids, packs[0].completion_mask, packs[0].seq_lengths, packs[0].loss_weights
    )
    wanted = mean_alone(model, [pack]).item()
    trainer = trainer_for(tmp_path / "out", model=model, packs=str(tmp_path / "packs"), max_steps=1)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(wanted, rel=1e-6)


def run_of_ranks(folder: Path, ranks: int) -> list[float]:
    """Return the losses of a weighted run in `ranks` processes, which run this file as a script."""
    arguments = ["-m", "tests.sfttrain.test_weights", str(folder), str(4 // ranks)]
    done = run_ranks(ranks, *arguments) if ranks > 1 else run_python(*arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[float] = json.loads((folder / "losses.json").read_text())
    return found


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
def test_two_ranks_train_a_weighted_step_like_one_rank(tmp_path: Path) -> None:
    two, one = run_of_ranks(tmp_path, 2), run_of_ranks(tmp_path, 1)
    assert len(one) == 6
    np.testing.assert_allclose(two, one, rtol=1e-6)


def main(folder: str, accumulation: str) -> None:
    """Run one rank of `run_of_ranks`."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": int(accumulation),
    }
    trainer = trainer_for(Path(folder), packs=WEIGHTED, optim="sgd", **settings)
    trainer.train()
    if trainer.is_world_process_zero():
        (Path(folder) / "losses.json").write_text(json.dumps(losses(trainer)))
    trainer.accelerator.wait_for_everyone()
    os._exit(0)  # the destruction of gloo's process group may hang: see `sfttrain.cli.main`


if __name__ == "__main__":
    main(*sys.argv[1:])
