"""One training run, top to bottom: data, model, checks, training, what is left behind."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, set_seed

from sftprep.errors import ConfigError
from sfttrain.checkpoints.output_folders import (
    MERGED_NAME,
    reject_foreign_output,
    reject_to_replace,
    reject_to_train_in_place,
)
from sfttrain.checkpoints.seal import Needs
from sfttrain.checkpoints.select import find_checkpoint, is_resume_requested
from sfttrain.cli.arguments import Request
from sfttrain.cli.console import Console
from sfttrain.cli.datasets import open_data, run_datasets, stream_of_run
from sfttrain.config.model_config import ModelConfig
from sfttrain.data.streaming import is_stream
from sfttrain.models.adapters import grow_embedding, merge_adapter
from sfttrain.models.loading import (
    check_code_is_pinned,
    check_match,
    code_that_runs,
    cpu_has_bfloat16,
    get_peft_config,
    get_quantization_config,
    load_model,
    tokenizer_for,
    trainable_share,
)
from sfttrain.models.unwrap import unwrap_peft
from sfttrain.trainer import SFTTrainer
from sfttrain.trainer_setup import init_options


@dataclass(frozen=True)
class RunSummary:
    """What a run did. Losses are means over trained tokens between logs; None where nothing was
    logged."""

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
    merged: str | None = None
    """Folder of the model with the adapter merged into it (--merge)."""
    rejected: int = 0
    """Records of a stream that were set aside in its last pass, by this process."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    def text(self) -> str:
        """For people."""
        losses = (
            ""
            if self.first_loss is None or self.last_loss is None
            else f", loss {self.first_loss:.4f} → {self.last_loss:.4f}"
        )
        lines = [
            f"{self.steps} steps in {self.seconds:.0f} s{losses}",
            f"{self.trained_tokens:,} trained tokens, {self.tokens_per_second:,.0f} a second",
            (
                f"the {self.kind} is in {self.output_dir} ({self.trained_parameters:,} of"
                f" {self.parameters:,} parameters trained)"
            ),
        ]
        if self.rejected:
            lines.append(
                "records of the stream that were set aside, since they cannot be used:"
                f" {self.rejected:,}"
            )
        if self.merged:
            lines.append(f"the model with the adapter merged into it is in {self.merged}")
        if "eval_loss" in self.evaluation:
            lines.insert(
                1,
                f"evaluation: loss {self.evaluation['eval_loss']:.4f}, perplexity"
                f" {self.evaluation['eval_perplexity']:.2f}",
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class Prepared:
    """A run that has passed its checks and can start."""

    trainer: SFTTrainer
    kind: str
    """adapter or model"""
    resume: str | bool | None
    """The checkpoint to resume from, as it was asked for."""
    told: tuple[str, ...]
    """Mismatches that were allowed."""
    merge: ModelConfig | None = None
    """Where the adapter is merged in the end: into this model."""


def prepare(request: Request) -> Prepared:
    """Find the data, load the model, and check that they belong together and that it keeps
    sequences apart.

    Raises the errors of sftprep.errors: ManifestError or ShardError for the packs, InputNotFound
    for the model, MismatchError where they do not belong together, AttentionError, ConfigError.
    """
    training, wanted = request.training, request.model
    if wanted.merge and training.model_init_kwargs:
        raise ConfigError(
            "merge loads the model once more, without model_init_kwargs",
            remedy="say the same with --model_revision and --dtype, or leave --merge out",
        )
    # Before the model is loaded; train() asks once more, and of the tokenizer too.
    reject_to_train_in_place(training.output_dir, [str(wanted.model_name_or_path)])
    reject_foreign_output(Path(str(training.output_dir)))
    if wanted.merge:
        reject_to_replace(Path(str(training.output_dir)) / MERGED_NAME)  # before hours of training
    check_code_is_pinned(wanted)
    shards: Any
    tokenizer: Any = None
    held_out: Any = None
    if request.run.stream:
        shards, tokenizer = stream_of_run(request.run, training, wanted)
    else:
        shards, held_out = run_datasets(request.run, evaluating=training.eval_strategy != "no")
    evaluation = open_data(request.run.eval_data) if request.run.eval_data else held_out
    if training.eval_strategy != "no" and evaluation is None:
        raise ConfigError(
            "there is nothing to evaluate on", remedy="give --eval_data DIR, or --eval_strategy no"
        )
    asked = (
        training.resume_from_checkpoint
        if is_resume_requested(training.resume_from_checkpoint)
        else None
    )
    if asked is not None:
        needs = Needs(
            ranks=training.world_size,
            stream=bool(request.run.stream),
            adapter=wanted.use_peft,
            optimizer=not training.save_only_model,
        )
        # Before the model is loaded; train() looks for it again, and reads it.
        find_checkpoint(asked, training.output_dir, needs=needs, read=False)
    built = hasattr(shards, "manifest")
    fingerprint = None
    if built:
        tokenizer, fingerprint = tokenizer_for(
            wanted, shards.manifest, training.allow_mismatch or ()
        )
    options: dict[str, Any] = {}
    if training.model_init_kwargs:
        options, training.attn = init_options(
            training, get_quantization_config(wanted), keep_attention=False
        )
        training.model_init_kwargs = None  # the trainer is given a model that is loaded
    model = load_model(wanted, device=training.device, options=options)
    grown = 0
    if built and tokenizer is not None and "tokenizer" in (training.allow_mismatch or ()):
        set_seed(training.seed)  # the embeddings of new tokens begin at random
        grown = grow_embedding(model, tokenizer, int(shards.manifest.tokenizer.get("max_id", -1)))
    told = check_match(model, shards, fingerprint, training.allow_mismatch or ()) if built else []
    peft_config = get_peft_config(wanted)
    trainer = SFTTrainer(
        model,
        training,
        train_dataset=shards,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    if grown:
        told.append(
            f"the tokenizer of the shards has more tokens than the model: its embedding has {grown}"
            " new rows"
        )
    trainer.code = code_that_runs(wanted)
    if trainer.code:
        told.append(f"code of {trainer.code} is run (--trust_remote_code)")
    _tell_here(trainer, told)
    kind = "adapter" if peft_config is not None else "model"
    return Prepared(trainer, kind, asked, tuple(told), wanted if wanted.merge else None)


def train(prepared: Prepared) -> RunSummary:
    """Train, and leave the adapter or model, with its tokenizer, in the output folder. Raises
    TrainingDiverged, and OutputBusy where another run writes to the folder."""
    with prepared.trainer.output_held():
        return _train(prepared)


def _train(prepared: Prepared) -> RunSummary:
    trainer = prepared.trainer
    start = time.perf_counter()
    result = trainer.train(resume_from_checkpoint=prepared.resume)
    seconds = time.perf_counter() - start
    trainer.save_model()
    if trainer.is_world_process_zero():
        trainer.save_state()
    final = trainer.evaluate() if trainer.eval_dataset is not None else {}
    merged = _merge(trainer, prepared.merge) if prepared.merge is not None else None
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trained, every = trainable_share(trainer.model)
    return RunSummary(
        steps=result.global_step - trainer.steps_before,
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
        resumed_from=trainer.resumed_from,
        evaluation=final,
        told=prepared.told,
        merged=merged,
        rejected=trainer.records_rejected(),
    )


def _merge(trainer: SFTTrainer, base: ModelConfig) -> str:
    """Merge the adapter that was just saved; by one process, from what is on the disk, however the
    model is spread out here."""
    output = str(Path(str(trainer.args.output_dir)) / MERGED_NAME)
    if trainer.is_world_process_zero():
        merge_adapter(
            str(trainer.args.output_dir),
            output,
            base=base,
            device=trainer.args.device,
            rows=int(unwrap_peft(trainer.model).get_input_embeddings().weight.shape[0]),
            tokenizer=trainer.processing_class,
        )
    return output


def _tell_here(trainer: SFTTrainer, told: Sequence[str]) -> None:
    """Leave the telling to Console: Trainer's own callbacks write to stdout, which belongs to the
    summary."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    feeding, trained = trainer.feeding, trainable_share(trainer.model)
    way = (
        f"rows unpacked into padded batches ({feeding.attention})"
        if feeding.unpack
        else feeding.attention
    )
    lines = [
        *(f"warning: {text}" for text in told),
        (
            f"attention: {way}; loss:"
            f" {'fused' if trainer.loss_plan.head is not None else 'from logits'}; {trained[0]:,}"
            f" of {trained[1]:,} parameters trained; {_how_many(trainer.train_dataset)}"
        ),
    ]
    if trainer.args.device.type == "cpu" and not trainer.args.bf16 and cpu_has_bfloat16():
        lines.append("this CPU computes in bfloat16 too: --bf16 trains faster, in mixed precision")
    trainer.add_callback(Console(lines))


def _how_many(source: Any) -> str:
    return "a stream of packs" if is_stream(source) else f"{len(source):,} packs"
