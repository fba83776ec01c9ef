"""transformers' Trainer, fed with packs: its loop, checkpoints and trackers; our order, attention, loss and evaluation."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

import sftprep
from sftprep.errors import ConfigError, TrainingDiverged
from sfttrain.attention import settle_attention
from sfttrain.config import ModelConfig, SFTConfig
from sfttrain.data import PackLoader, PackSource, StepPlan, StepSampler, collate_packs, longest_sequence
from sfttrain.feeding import Feeding, RowBatch, scored_outputs
from sfttrain.loss import LossSums, plan_loss
from sfttrain.metrics import Counters, Reading
from sfttrain.model import add_adapter, load_model
from sfttrain.neftune import noise_by_sequence
from sfttrain.resume import RunState, find_checkpoint


class SFTTrainer(Trainer):  # type: ignore[misc]
    """Fine-tunes a causal language model on packs.

    model: a transformers model, a PeftModel, or the folder or Hub name of a model; args: an SFTConfig;
    train_dataset, eval_dataset: a build's folder, what `sftprep.open_shards` gives, or anything like it (`PackSource`);
    eval_dataset may be a mapping of names to such; processing_class: the tokenizer, which is saved beside the model;
    peft_config: a peft.LoraConfig, to train an adapter.
    Raises AttentionError where packed sequences cannot be kept apart, ConfigError for what does not go together.
    """

    # The loss is divided by the trained tokens of the whole step, so it must not be divided by the micro-batches again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module | str | os.PathLike[str],
        args: SFTConfig | None = None,
        data_collator: None = None,
        train_dataset: PackSource | str | os.PathLike[str] | None = None,
        eval_dataset: PackSource | str | os.PathLike[str] | Mapping[str, PackSource | str | os.PathLike[str]] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = args if args is not None else SFTConfig(output_dir="trainer_output")
        if data_collator is not None:
            raise ConfigError("packs have a collator of their own", remedy="leave data_collator out")
        self._refuse_parallelism(args)
        if isinstance(model, (str, os.PathLike)):
            model = load_model(ModelConfig(model_name_or_path=str(model), use_peft=peft_config is not None), device=args.device)
        if peft_config is not None:
            model = add_adapter(model, peft_config)
        train = _open(train_dataset) if train_dataset is not None else None
        evaluation = (
            {name: _open(source) for name, source in eval_dataset.items()}
            if isinstance(eval_dataset, Mapping)
            else (_open(eval_dataset) if eval_dataset is not None else None)
        )
        super().__init__(
            model=model,
            args=args,
            data_collator=collate_packs,
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # Trainer counts the trained tokens of a step only for models whose forward takes the count; here the loss does.
        self.model_accepts_loss_kwargs = True
        # Trainer's NEFTune scales by the length of the row; ours, by that of the sequence, is switched on in train().
        self._noise, self.neftune_noise_alpha = args.neftune_noise_alpha, None
        sources = [
            s for s in [train, *(evaluation.values() if isinstance(evaluation, Mapping) else [evaluation])] if s is not None
        ]
        longest = max((_longest(source) for source in sources), default=0)
        mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision)
        self.feeding: Feeding = settle_attention(
            self.model, args.attn, longest=longest, autocast=mixed, guard=args.isolation_guard
        )
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled or args.torch_compile
        self.loss_plan = plan_loss(self.model, args.loss_impl, args.loss_type, fusable=not sharded)
        self._counters = Counters(args.device)
        self.trained_tokens = 0
        """Targets seen over all ranks, those before a resume included; up to the last log."""
        self.trained_tokens_here = 0
        """Those of this call of train()."""

    # ---- feeding ----

    def step_plan(self) -> StepPlan:
        """Which packs each step trains on."""
        args = self.args
        return StepPlan(
            packs=len(self.train_dataset),
            rows=self._train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            world=args.world_size,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            shuffle=args.train_sampling_strategy != "sequential",
            drop_last=args.dataloader_drop_last,
        )

    def get_train_dataloader(self) -> PackLoader:
        """The packs of this rank, in the order of `step_plan`."""
        if self.train_dataset is None:
            raise ConfigError("there is nothing to train on", remedy="give train_dataset")
        return self._loader(self.train_dataset, self.step_plan())

    def get_eval_dataloader(self, eval_dataset: str | PackSource | None = None) -> PackLoader:
        """The share of this rank in an evaluation set, in the order of the shards."""
        chosen = eval_dataset if eval_dataset is not None else self.eval_dataset
        if isinstance(chosen, str):
            chosen = self.eval_dataset[chosen]
        if chosen is None:
            raise ConfigError("there is nothing to evaluate on", remedy="give eval_dataset")
        rows = self.args.per_device_eval_batch_size
        return self._loader(chosen, StepPlan(packs=len(chosen), rows=rows, world=self.args.world_size, shuffle=False))

    def _loader(self, source: PackSource, plan: StepPlan) -> PackLoader:
        args = self.args
        pin = args.dataloader_pin_memory and args.device.type == "cuda"
        return PackLoader(source, StepSampler(plan, args.process_index), workers=args.dataloader_num_workers, pin_memory=pin)

    # ---- loss ----

    def row_sums(self, model: nn.Module, batch: RowBatch) -> tuple[LossSums, Tensor]:
        """Run the model on a row; the sums of its loss, and what they were made from ([n, V] logits, or hidden states)."""
        with self.loss_plan.outputs_are_hidden():
            outputs, targets = scored_outputs(model, batch, self.feeding)
        return self.loss_plan.sums(outputs, targets), outputs

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The share of this row in the mean loss of the step's trained tokens, over all its rows and ranks.

        num_items_in_batch: trained tokens of the step; without it (evaluation) those of the row.
        """
        sums, outputs = self.row_sums(model, cast(RowBatch, inputs))
        if model.training:
            self._counters.add(sums)
        items = sums.tokens if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=sums.loss.device)
        loss = sums.loss / items.clamp(min=1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over ranks, and must be summed
        return (loss, {"outputs": outputs}) if return_outputs else loss

    # ---- training, logging, saving ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """Train, from the start or from a checkpoint (a folder, or True for the newest complete one in output_dir).

        Raises InputNotFound or ConfigError where there is no such checkpoint, MismatchError where it is of another run.
        """
        folder = find_checkpoint(resume_from_checkpoint, self.args.output_dir) if resume_from_checkpoint else None
        self.trained_tokens = self.trained_tokens_here = 0
        if folder is not None:
            before = RunState.load(folder)
            if before is not None:
                self.run_state().must_continue(before, folder)
                self.trained_tokens = before.trained_tokens
        self._counters = Counters(self.args.device)
        with noise_by_sequence(self.model, self._noise):
            result = super().train(resume_from_checkpoint=folder, **options)
        self._read_counters()  # what came after the last log
        return result

    def run_state(self) -> RunState:
        """What a checkpoint of this run, now, says of it."""
        plan = self.step_plan()
        digest = str(getattr(getattr(self.train_dataset, "manifest", None), "digest", ""))
        return RunState(digest, plan.packs_per_step, plan.seed, self.trained_tokens)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add trained tokens, their speed and token accuracy to what is logged of training; stop where the loss is no number."""
        if "loss" in logs:
            reading = self._read_counters()
            logs = {
                **logs,
                "mean_token_accuracy": reading.accuracy,
                "num_tokens": self.trained_tokens,
                "tokens_per_second": reading.tokens_per_second,
            }
            if not math.isfinite(logs["loss"]):
                raise TrainingDiverged(
                    f"the loss is {logs['loss']} at step {self.state.global_step}",
                    remedy="go on from an earlier checkpoint with a lower --learning_rate, or a longer --warmup_steps",
                )
        super().log(logs, start_time)

    def _read_counters(self) -> Reading:
        reading = self._counters.read(self.accelerator)
        self.trained_tokens += reading.tokens
        self.trained_tokens_here += reading.tokens
        return reading

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Read before it is saved: a run that goes on from here has seen these tokens, logged or not. What was read is kept
        # for the next log.
        total = self.trained_tokens + self._counters.peek(self.accelerator).tokens
        if self.args.should_save:
            state = self.run_state()
            folder = os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
            RunState(state.data, state.packs_per_step, state.seed, total).save(folder)
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # Trainer pickles its arguments beside the model, the access token for the Hub among them.
        token, self.args.hub_token = self.args.hub_token, None
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token

    # ---- evaluation ----

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Loss, perplexity and accuracy over all trained positions of an evaluation set, each counted once.

        eval_dataset: packs, a build's folder, the name of one of the trainer's sets, or a mapping of names to such; with
        several sets each has its own metrics, `eval_NAME_loss` and so on. ignore_keys is Trainer's, and not used.
        """
        chosen = eval_dataset if eval_dataset is not None else self.eval_dataset
        if isinstance(chosen, Mapping):
            metrics: dict[str, float] = {}
            for name, source in chosen.items():
                metrics.update(self.evaluate(source, metric_key_prefix=f"{metric_key_prefix}_{name}"))
            return metrics
        if isinstance(chosen, (str, os.PathLike)) and not (
            isinstance(self.eval_dataset, Mapping) and chosen in self.eval_dataset
        ):
            chosen = _open(chosen)
        loader = self.get_eval_dataloader(chosen)
        was = self.model.training
        self.model.eval()
        counters = Counters(self.args.device)
        with torch.no_grad(), self._evaluation_precision():
            for batch in loader:
                sums, _ = self.row_sums(self.model, cast(RowBatch, self._prepare_inputs(cast(Any, batch))))
                counters.add(sums)
        self.model.train(was)
        reading = counters.read(self.accelerator)
        found = {
            "loss": reading.loss,
            "perplexity": reading.perplexity,
            "mean_token_accuracy": reading.accuracy,
            "num_tokens": reading.tokens,
            "runtime": round(reading.seconds, 4),
            "tokens_per_second": round(reading.tokens_per_second, 1),
        }
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluation_precision(self) -> Any:
        """The precision of training: before training, the model has not been wrapped for it."""
        return self.accelerator.autocast()

    def _refuse_parallelism(self, args: SFTConfig) -> None:
        if args.n_gpu > 1:
            raise ConfigError(
                f"one process would share its rows out to {args.n_gpu} GPUs, and a packed row cannot be shared out",
                remedy=f"start a process for each GPU: torchrun --nproc_per_node {args.n_gpu} -m sfttrain run ...",
            )
        parallelism = args.parallelism_config
        for name in ("cp_size", "sp_size"):
            if parallelism is not None and getattr(parallelism, name, 1) > 1:
                raise ConfigError(f"{name} is above 1: packed sequences would see each other", remedy=f"leave {name} at 1")


def _open(source: PackSource | str | os.PathLike[str]) -> PackSource:
    """Packs, from a build's folder or as they are."""
    if isinstance(source, (str, os.PathLike)):
        return cast(PackSource, sftprep.open_shards(source))
    if not hasattr(source, "seq_lengths"):
        raise ConfigError(
            f"a {type(source).__name__} holds no packs",
            remedy="build packs first with sftprep build, and give the build's folder",
        )
    return source


def _longest(source: PackSource) -> int:
    manifest = getattr(source, "manifest", None)
    return int(manifest.max_length) if manifest is not None else longest_sequence(source)
