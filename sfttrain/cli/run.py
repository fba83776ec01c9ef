"""One run of `sfttrain run`: preparation with checks, training, and the summary.

1. Check what can be checked before the model is loaded: the output folder, the checkpoint.
2. Open the data, and load the model and its tokenizer.
3. Check that data and model fit each other, and create the trainer, which checks the attention.
4. Train, save, evaluate, and merge the adapter, while the output folder is locked.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, set_seed

from sftprep.errors import ConfigError, FlagNames, format_count, render_settings, setting
from sfttrain.checkpoints.output_folders import (
    MERGED_NAME,
    reject_to_replace,
    reject_to_train_in_place,
    reject_unowned_output,
)
from sfttrain.checkpoints.seal import Needs
from sfttrain.checkpoints.select import find_checkpoint, is_resume_requested
from sfttrain.cli.arguments import NO_EVALUATION, Request
from sfttrain.cli.console import Console
from sfttrain.cli.datasets import (
    load_run_datasets,
    open_data,
    open_eval_build,
    open_run_stream,
)
from sfttrain.cli.summary import RunSummary
from sfttrain.config.model_config import ModelConfig
from sfttrain.config.sft_config import SFTConfig
from sfttrain.data.streaming import is_stream
from sfttrain.models.adapters import grow_embedding, merge_adapter
from sfttrain.models.build_tokenizer import fit_to_build, tokenizer_for
from sfttrain.models.loading import (
    check_match,
    cpu_has_bfloat16,
    get_peft_config,
    get_quantization_config,
    load_model,
    trainable_share,
)
from sfttrain.models.remote_code import check_code_is_pinned, code_that_runs
from sfttrain.models.unwrap import unwrap_peft
from sfttrain.trainer import SFTTrainer
from sfttrain.trainer_setup import init_options


@dataclass(frozen=True)
class PreparedRun:
    """A run after its checks, ready to start."""

    trainer: SFTTrainer
    kind: str
    """"adapter" or "model"."""
    resume: str | bool | None
    """The requested checkpoint: a folder, or True or "latest"; None for a new run."""
    warnings: tuple[str, ...]
    """The warnings about allowed mismatches and executed code."""
    merge_into: ModelConfig | None = None
    """The model into which the adapter is merged at the end; None if it is not merged."""


@dataclass(frozen=True)
class _RunData:
    """The data of a run."""

    train: Any
    evaluation: Any | None
    tokenizer: Any | None
    """The tokenizer of a stream; None for other data."""
    notice: str = ""
    """The line about an evaluation that the user did not request."""

    @property
    def is_build(self) -> bool:
        """Whether the training data is a build.

        The manifest of a build can be compared with the model.
        """
        return hasattr(self.train, "manifest")


def prepare(request: Request) -> PreparedRun:
    """Open the data, load the model, and check that they fit each other.

    Raises:
        ManifestError: The folder is not a finished build.
        ShardError: A shard is damaged.
        InputNotFound: The data, the model or the checkpoint does not exist.
        MismatchError: The data and the model do not fit each other.
        AttentionError: Packed sequences cannot be kept apart.
        ConfigError: The settings contradict each other.
    """
    training, model_config = request.training, request.model
    _check_output_folder(training, model_config)
    check_code_is_pinned(model_config)
    data = _open_run_data(request)
    resume = _find_requested_checkpoint(request)
    model, tokenizer, warnings = _load_matching_model(data, training, model_config)
    peft_config = get_peft_config(model_config)
    trainer = SFTTrainer(
        model,
        training,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.code = code_that_runs(model_config)
    if trainer.code:
        warnings.append(f"code of {trainer.code} is run (trust_remote_code)")
    _add_console(trainer, warnings, data.notice)
    kind = "adapter" if peft_config is not None else "model"
    merge_into = model_config if model_config.merge else None
    return PreparedRun(trainer, kind, resume, tuple(warnings), merge_into)


def _check_output_folder(training: SFTConfig, model_config: ModelConfig) -> None:
    """Refuse an unusable output folder before the model is loaded.

    train() checks it again, with the folder of the tokenizer in addition.
    """
    output = Path(str(training.output_dir))
    if model_config.merge and training.model_init_kwargs:
        raise ConfigError(
            f"{setting('merge')} loads the model a second time, without"
            f" {setting('model_init_kwargs')}",
            remedy=[
                f"use {setting('model_revision')} and {setting('dtype')} instead",
                f"leave {setting('merge')} out",
            ],
        )
    reject_to_train_in_place(training.output_dir, [str(model_config.model_name_or_path)])
    reject_unowned_output(output)
    if model_config.merge:
        reject_to_replace(output / MERGED_NAME)  # now, and not after hours of training


def _open_run_data(request: Request) -> _RunData:
    """Open the data for training and evaluation."""
    run, training = request.run, request.training
    is_evaluating = training.eval_strategy != "no"
    length = training.requested_length
    train: Any
    tokenizer: Any = None
    test_split: Any = None
    if run.stream:
        train, tokenizer = open_run_stream(run, training, request.model)
    else:
        train, test_split = load_run_datasets(run, evaluating=is_evaluating, max_length=length)
    evaluation = test_split
    if run.eval_data is not None:
        evaluation = None if run.eval_data == NO_EVALUATION else open_data(run.eval_data, length)
    notice = ""
    if run.eval_data is None and (held_out := open_eval_build(train, length)) is not None:
        evaluation, notice = held_out, _describe_evaluation(held_out, during=is_evaluating)
    if is_evaluating and evaluation is None:
        raise ConfigError(
            "there is nothing to evaluate on",
            remedy=[
                f"specify {setting('eval_data', 'DIR')}",
                f"use {setting('eval_strategy', 'no')}",
            ],
        )
    return _RunData(train, evaluation, tokenizer, notice)


def _describe_evaluation(shards: Any, *, during: bool) -> str:
    """Return the line about an evaluation that the user did not request."""
    text = f"evaluation: {shards.root}, {format_count(len(shards), 'pack')}, "
    strategy = setting("eval_strategy", "steps")
    when = "during training and at the end" if during else f"at the end ({strategy}: more often)"
    return render_settings(f"{text}{when}; {setting('eval_data', 'none')}: none", FlagNames("_"))


def _find_requested_checkpoint(request: Request) -> str | bool | None:
    """Check that the requested checkpoint exists, before the model is loaded.

    train() searches for it again, and reads all of its files.
    """
    training = request.training
    requested = training.resume_from_checkpoint
    if not is_resume_requested(requested):
        return None
    needs = Needs(
        ranks=training.world_size,
        stream=bool(request.run.stream),
        adapter=request.model.use_peft,
        optimizer=not training.save_only_model,
    )
    find_checkpoint(requested, training.output_dir, needs=needs, check_content=False)
    return requested  # type: ignore[no-any-return]


def _load_matching_model(
    data: _RunData, training: SFTConfig, model_config: ModelConfig
) -> tuple[Any, Any | None, list[str]]:
    """Load the model and its tokenizer, and check that a build was made for them.

    Returns:
        The model, the tokenizer or None, and warnings about allowed mismatches.
    """
    allowed = training.allow_mismatch or ()
    tokenizer, fingerprint = data.tokenizer, None
    if data.is_build:
        tokenizer, fingerprint = tokenizer_for(model_config, data.train.manifest, allowed)
    options: dict[str, Any] = {}
    if training.model_init_kwargs:
        options, training.attn = init_options(
            training, get_quantization_config(model_config), keep_attention=False
        )
        training.model_init_kwargs = None  # the trainer refuses them for a loaded model
    model = load_model(model_config, device=training.device, options=options)
    new_rows = 0
    if data.is_build and tokenizer is not None:
        set_seed(training.seed)  # the embeddings of new tokens are initialized at random
        fit_to_build(model, tokenizer, data.train.manifest)
        if "tokenizer" in allowed:
            max_id = int(data.train.manifest.tokenizer.get("max_id", -1))
            new_rows = grow_embedding(model, tokenizer, max_id)
    warnings = check_match(model, data.train, fingerprint, allowed) if data.is_build else []
    if new_rows:
        warnings.append(
            "the tokenizer of the shards has more tokens than the model: its embedding has"
            f" {new_rows} new rows"
        )
    return model, tokenizer, warnings


def train(prepared: PreparedRun) -> RunSummary:
    """Train, save the model or adapter with its tokenizer, evaluate, and merge.

    Raises:
        TrainingDiverged: The loss, the gradient or a weight is not finite.
        OutputBusy: Another run writes to the output folder.
    """
    with prepared.trainer.output_held():
        return _train_and_save(prepared)


def _train_and_save(prepared: PreparedRun) -> RunSummary:
    trainer = prepared.trainer
    start = time.perf_counter()
    result = trainer.train(resume_from_checkpoint=prepared.resume)
    seconds = time.perf_counter() - start
    trainer.save_model()
    if trainer.is_world_process_zero():
        trainer.save_state()
    evaluation = trainer.evaluate() if trainer.eval_dataset is not None else {}
    merged = _merge(trainer, prepared.merge_into) if prepared.merge_into is not None else None
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trained_count, total_count = trainable_share(trainer.model)
    return RunSummary(
        steps=result.global_step - trainer.steps_before,
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
        trained_tokens=trainer.trained_tokens,
        seconds=round(seconds, 3),
        tokens_per_second=round(trainer.trained_tokens_here / seconds, 1),
        trained_parameters=trained_count,
        parameters=total_count,
        attention=trainer.feeding.attention,
        unpacked=trainer.feeding.unpack,
        loss_impl="fused" if trainer.loss_plan.head is not None else "logits",
        kind=prepared.kind,
        output_dir=str(trainer.args.output_dir),
        resumed_from=trainer.resumed_from,
        evaluation=evaluation,
        warnings=prepared.warnings,
        merged=merged,
        rejected=trainer.records_rejected(),
    )


def _merge(trainer: SFTTrainer, base: ModelConfig) -> str:
    """Merge the saved adapter into its base; return the folder.

    One process does this from the files, because the model may be sharded over the processes.
    """
    output = str(Path(str(trainer.args.output_dir)) / MERGED_NAME)
    if trainer.is_world_process_zero():
        merge_adapter(
            str(trainer.args.output_dir),
            output,
            base=base,
            device=trainer.args.device,
            trained=unwrap_peft(trainer.model),
            tokenizer=trainer.processing_class,
        )
    return output


def _add_console(trainer: SFTTrainer, warnings: Sequence[str], notice: str) -> None:
    """Replace Trainer's own output to stdout by Console.

    stdout is reserved for the summary.
    """
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    feeding = trainer.feeding
    trained_count, total_count = trainable_share(trainer.model)
    attention = (
        f"rows unpacked into padded batches ({feeding.attention})"
        if feeding.unpack
        else feeding.attention
    )
    lines = [
        *(f"warning: {text}" for text in warnings),
        (
            f"attention: {attention}; loss:"
            f" {'fused' if trainer.loss_plan.head is not None else 'from logits'};"
            f" {trained_count:,} of {total_count:,} parameters trained;"
            f" {_describe_size(trainer.train_dataset)}"
        ),
    ]
    if notice:
        lines.append(notice)
    if trainer.args.device.type == "cpu" and not trainer.args.bf16 and cpu_has_bfloat16():
        lines.append("this CPU supports bfloat16: bf16 trains faster, in mixed precision")
    trainer.add_callback(Console(lines))


def _describe_size(source: Any) -> str:
    return "a stream of packs" if is_stream(source) else format_count(len(source), "pack")
