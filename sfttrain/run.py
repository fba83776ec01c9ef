"""One training run, top to bottom: packs, model, checks, training, what is left behind."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerState, set_seed

import sftprep
from sftprep.errors import ConfigError, InputNotFound
from sfttrain.arguments import Request
from sfttrain.console import Console
from sfttrain.model import add_adapter, check_match, get_peft_config, load_model, tokenizer_for, trainable_share
from sfttrain.resume import find_checkpoint
from sfttrain.trainer import SFTTrainer


@dataclass(frozen=True)
class RunSummary:
    """What a run did. Losses are means over trained tokens between logs; None where nothing was logged."""

    steps: int
    """Optimizer steps of this run, without those before a resume."""
    first_loss: float | None
    """The first that was logged, before a resume too."""
    last_loss: float | None
    trained_tokens: int
    """Targets seen, those before a resume included."""
    seconds: float
    tokens_per_second: float
    """Trained tokens a second of this run."""
    trained_parameters: int
    parameters: int
    attention: str
    unpacked: bool
    loss_impl: str
    kind: str
    """adapter or model"""
    output_dir: str
    resumed_from: str | None
    evaluation: dict[str, float]
    told: tuple[str, ...]
    """Mismatches that were allowed."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    def text(self) -> str:
        """For people."""
        losses = (
            "" if self.first_loss is None or self.last_loss is None else f", loss {self.first_loss:.4f} → {self.last_loss:.4f}"
        )
        lines = [
            f"{self.steps} steps in {self.seconds:.0f} s{losses}",
            f"{self.trained_tokens:,} trained tokens, {self.tokens_per_second:,.0f} a second",
            f"the {self.kind} is in {self.output_dir} ({self.trained_parameters:,} of {self.parameters:,} parameters trained)",
        ]
        if "eval_loss" in self.evaluation:
            lines.insert(
                1, f"evaluation: loss {self.evaluation['eval_loss']:.4f}, perplexity {self.evaluation['eval_perplexity']:.2f}"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class Prepared:
    """A run that has passed its checks and can start."""

    trainer: SFTTrainer
    kind: str
    """adapter or model"""
    checkpoint: str | None
    """Folder of the checkpoint it goes on from."""
    told: tuple[str, ...]
    """Mismatches that were allowed."""


def prepare(request: Request) -> Prepared:
    """Open the packs, load the model, and check that they belong together and that it keeps sequences apart.

    Raises the errors of sftprep.errors: ManifestError or ShardError for the packs, InputNotFound for the model,
    MismatchError where they do not belong together, AttentionError, ConfigError.
    """
    training, wanted = request.training, request.model
    shards = _packs(str(request.run.data))
    evaluation = _packs(request.run.eval_data) if request.run.eval_data else None
    if training.eval_strategy != "no" and evaluation is None:
        raise ConfigError("there is nothing to evaluate on", remedy="give --eval_data DIR, or --eval_strategy no")
    asked = training.resume_from_checkpoint
    checkpoint = find_checkpoint(asked, training.output_dir) if asked and str(asked).lower() != "false" else None
    name = str(wanted.model_name_or_path)
    tokenizer, fingerprint = tokenizer_for(name, shards.manifest, trust_remote_code=wanted.trust_remote_code)
    model = load_model(wanted, device=training.device)
    told = check_match(model, shards, fingerprint, training.allow_mismatch or ())
    peft_config = get_peft_config(wanted)
    if peft_config is not None:
        # After Trainer's own seed would be too late: the adapter's first weights are random.
        set_seed(training.seed)
        model = add_adapter(model, peft_config)
    trainer = SFTTrainer(model, training, train_dataset=shards, eval_dataset=evaluation, processing_class=tokenizer)
    _tell_here(trainer, told)
    return Prepared(trainer, "adapter" if peft_config is not None else "model", checkpoint, tuple(told))


def train(prepared: Prepared) -> RunSummary:
    """Train, and leave the adapter or model, with its tokenizer, in the output folder. Raises TrainingDiverged."""
    trainer, checkpoint = prepared.trainer, prepared.checkpoint
    start = time.perf_counter()
    before = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json")).global_step if checkpoint else 0
    result = trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - start
    trainer.save_model()
    if trainer.is_world_process_zero():
        trainer.save_state()
    final = trainer.evaluate() if trainer.eval_dataset is not None else {}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trained, every = trainable_share(trainer.model)
    return RunSummary(
        steps=result.global_step - before,
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
        trained_tokens=trainer.trained_tokens,
        seconds=round(seconds, 3),
        tokens_per_second=round(trainer.trained_tokens_here / seconds, 1),
        trained_parameters=trained,
        parameters=every,
        attention=trainer.feeding.attention,
        unpacked=trainer.feeding.unpack,
        loss_impl="fused" if trainer.loss_plan.head is not None else "logits",
        kind=prepared.kind,
        output_dir=str(trainer.args.output_dir),
        resumed_from=checkpoint,
        evaluation=final,
        told=prepared.told,
    )


def _packs(folder: str) -> Any:
    path = Path(folder)
    if path.is_file():
        raise ConfigError(
            f"{folder} is a file of records, not a folder of packs",
            remedy=f"build packs first: sftprep build {folder} --tokenizer MODEL --output PACKS, then: sfttrain run PACKS ...",
        )
    if not path.exists():
        raise InputNotFound(f"there is no folder {folder}", remedy="give the folder that `sftprep build` wrote")
    return sftprep.open_shards(os.fspath(path))


def _tell_here(trainer: SFTTrainer, told: Sequence[str]) -> None:
    """Leave the telling to Console: Trainer's own callbacks write to stdout, which belongs to the summary."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    feeding, trained = trainer.feeding, trainable_share(trainer.model)
    way = f"rows unpacked into padded batches ({feeding.attention})" if feeding.unpack else feeding.attention
    lines = [
        *(f"warning: {text}" for text in told),
        f"attention: {way}; loss: {'fused' if trainer.loss_plan.head is not None else 'from logits'}; "
        f"{trained[0]:,} of {trained[1]:,} parameters trained; {len(trainer.train_dataset):,} packs",
    ]
    trainer.add_callback(Console(lines))
