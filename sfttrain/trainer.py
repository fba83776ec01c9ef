"""transformers' Trainer, fed with packs: its loop, checkpoints and trackers; our order, attention,
loss and evaluation."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput
from transformers.trainer_utils import PredictionOutput

from sftprep.errors import ConfigError
from sfttrain.checkpoints.output_folders import reject_to_train_in_place
from sfttrain.checkpoints.select import RunState, read_step
from sfttrain.data.batching import (
    PackLoader,
    RowBatch,
    StepPlan,
    StepSampler,
    collate_filled,
    collate_packs,
)
from sfttrain.data.custom_collator import Collator, collated
from sfttrain.data.inputs import is_packs
from sfttrain.data.prepare import longest_in
from sfttrain.data.streaming import TrainLoader, is_stream, reject_evaluation
from sfttrain.losses.collated_loss import foreign_sums
from sfttrain.losses.fused_cross_entropy import LossPlan, LossSums, loss_from_logits, plan_loss
from sfttrain.losses.router_aux import ExpertBalance
from sfttrain.metrics.predictions import Predictions, Preprocess, all_logits
from sfttrain.metrics.token_metrics import CounterReading, Counters
from sfttrain.models.unwrap import unwrap_peft
from sfttrain.packed.attention import settle_attention
from sfttrain.packed.forward import ForwardMode, scored_outputs
from sfttrain.packed.neftune import noise_by_sequence
from sfttrain.saving_trainer import SavingTrainer
from sfttrain.trainer_datasets import packs_for_evaluation, rows_for_collator
from sfttrain.trainer_setup import resolve_trainer_parts

logger = logging.getLogger(__name__)


class SFTTrainer(SavingTrainer):
    """Fine-tunes a causal language model; takes what TRL's SFTTrainer takes.

    model: a transformers model, a PeftModel, or the folder or Hub name of a model; args: an
    SFTConfig. train_dataset, eval_dataset: a datasets.Dataset or IterableDataset, a list of
    dictionaries, or the path of a file of records, which are prepared once by sftprep and kept in
    its cache; or packs: a build's folder, what `sftprep.open_shards` gives, anything like it
    (`PackSource`), taken as they are, whatever `args` says of packing. eval_dataset may be a
    mapping of names to such. processing_class: the tokenizer (or a processor that has one), by
    default the model's own; it is saved beside the model. formatting_func: makes the text of a row;
    data_collator: makes whole batches of rows, in place of ours, and nothing is packed.
    peft_config: a peft.LoraConfig, to train an adapter; quantization_config: for a model given by
    name. compute_loss_func(outputs, labels, num_items_in_batch): a loss of your own, from the
    logits of whole rows; compute_metrics and preprocess_logits_for_metrics: see
    `sfttrain.metrics.predictions`. Raises AttentionError where packed sequences cannot be kept
    apart, ConfigError for what does not go together, and the errors of loading a model and of
    `sftprep.build`.
    """

    # The loss is divided by the trained tokens of the whole step, so it must not be divided by the
    # micro-batches again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module | str | os.PathLike[str],
        args: TrainingArguments | None = None,
        data_collator: Collator | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_loss_func: Callable[..., Tensor] | None = None,
        compute_metrics: Callable[[Any], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Preprocess | None = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        formatting_func: Callable[[Any], Any] | None = None,
    ) -> None:
        parts = resolve_trainer_parts(
            model,
            args,
            train=train_dataset,
            evaluation=eval_dataset,
            processing=processing_class,
            quantization_config=quantization_config,
            peft_config=peft_config,
            formatting=formatting_func,
            collator=data_collator,
        )
        self._collator = data_collator
        settings = parts.args
        if compute_loss_func is not None and settings.loss_type != "nll":
            raise ConfigError(
                "compute_loss_func is a loss of its own, and loss_type asks for another",
                remedy="leave one of them out",
            )
        super().__init__(
            parts,
            model=parts.model,
            args=settings,
            data_collator=data_collator or collate_packs,
            train_dataset=parts.train,
            eval_dataset=parts.evaluation,
            processing_class=parts.processing,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        # Trainer counts the trained tokens of a step only for models whose forward takes the count;
        # here the loss does.
        self.model_accepts_loss_kwargs = True
        # Trainer's NEFTune scales by the length of the row; ours, by that of the sequence, is
        # switched on in train().
        self._noise, self.neftune_noise_alpha = settings.neftune_noise_alpha, None
        self.feeding, self.loss_plan = self._settle_feeding()
        self.steps_before = 0
        """Optimizer steps of the run before this call of train()."""
        self._balance = ExpertBalance(self.model, settings.router_aux_loss_coef)
        self.trained_tokens_here = 0
        """Those of this call of train()."""

    # ---- feeding ----

    def _settle_feeding(self) -> tuple[ForwardMode, LossPlan]:
        """How rows are given to the model, proved on it, and how their loss is made."""
        args: Any = self.args
        if self._collator is not None:
            # What a foreign collator makes is fed as it is.
            implementation = str(unwrap_peft(self.model).config._attn_implementation)
            return ForwardMode.of(self.model, implementation, unpack=True), LossPlan(args.loss_type)
        sets = (
            list(self.eval_dataset.values())
            if isinstance(self.eval_dataset, Mapping)
            else [self.eval_dataset]
        )
        reject_evaluation(sets)
        longest = max(
            (longest_in(source) for source in [self.train_dataset, *sets] if source is not None),
            default=0,
        )
        mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision)
        feeding: ForwardMode = settle_attention(
            self.model,
            self._parts.attention,
            longest=longest,
            autocast=mixed,
            guard=args.isolation_guard,
        )
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled or args.torch_compile
        return feeding, plan_loss(self.model, args.loss_impl, args.loss_type, fusable=not sharded)

    def step_plan(self) -> StepPlan:
        """Which packs each step trains on."""
        args = self.args
        return StepPlan(
            packs=0 if is_stream(self.train_dataset) else len(self.train_dataset),
            rows=self._train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            world=args.world_size,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            shuffle=args.train_sampling_strategy != "sequential",
            drop_last=args.dataloader_drop_last,
        )

    def get_train_dataloader(self) -> PackLoader | TrainLoader:
        """The packs of this rank, in the order of `step_plan`, or in that of their stream."""
        if self.train_dataset is None:
            raise ConfigError("there is nothing to train on", remedy="give train_dataset")
        if is_stream(self.train_dataset):
            rows, collate = self._train_batch_size, self._collate_for(self.train_dataset)
            self._stream = TrainLoader(self.train_dataset, self.args, rows, collate)
            if self.resumed_from is not None:
                self._stream.go_on(self.resumed_from)
            return self._stream
        return self._loader(self.train_dataset, self.step_plan())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> PackLoader:
        """The share of this rank in an evaluation set: the trainer's, one of its sets by name, or
        packs; in their order."""
        chosen = eval_dataset if eval_dataset is not None else self.eval_dataset
        if isinstance(chosen, str):
            chosen = self.eval_dataset[chosen]
        if chosen is None:
            raise ConfigError("there is nothing to evaluate on", remedy="give eval_dataset")
        rows = self.args.per_device_eval_batch_size
        return self._loader(
            chosen,
            StepPlan(packs=len(chosen), rows=rows, world=self.args.world_size, shuffle=False),
        )

    def _loader(self, source: Any, plan: StepPlan) -> PackLoader:
        args = self.args
        workers = args.dataloader_num_workers
        options: dict[str, Any] = {
            "pin_memory": args.dataloader_pin_memory and args.device.type == "cuda"
        }
        if workers:
            options["prefetch_factor"] = args.dataloader_prefetch_factor
            options["multiprocessing_context"] = args.dataloader_multiprocessing_context
            options["in_order"] = args.dataloader_in_order
        sampler = StepSampler(plan, args.process_index)
        return PackLoader(
            source, sampler, collate=self._collate_for(source), workers=workers, **options
        )

    def _collate_for(self, source: Any) -> Callable[[list[Any]], Any]:
        if self._collator is not None:
            return partial(collated, collator=self._collator, spare=source[0])
        multiple = self.args.pad_to_multiple_of
        if multiple is None:
            return collate_packs
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        return partial(
            collate_filled,
            multiple=multiple,
            pad_token_id=getattr(tokenizer, "pad_token_id", None) or 0,
        )

    # ---- loss ----

    def row_sums(self, model: nn.Module, batch: RowBatch) -> tuple[LossSums, Tensor]:
        """Run the model on a row; the sums of its loss, and what they were made from ([n, V]
        logits, or hidden states)."""
        with self.loss_plan.outputs_are_hidden():
            scored = scored_outputs(model, batch, self.feeding)
        return self.loss_plan.sums(*scored), scored.outputs

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The share of this row in the mean loss of the step's trained tokens, over all its rows
        and ranks.

        num_items_in_batch: what the trained tokens of the step weigh together (without weights: how
        many they are); without it (evaluation) those of the row.
        """
        with self._activations_kept(model), self._balance.listening(model.training) as heard:
            sums, outputs = self._sums(model, inputs, num_items_in_batch)
        if model.training:
            self._counters.add(sums)
        items = (
            sums.weight
            if num_items_in_batch is None
            else torch.as_tensor(num_items_in_batch, device=sums.loss.device)
        )
        loss = sums.loss / torch.where(
            items == 0, 1, items
        )  # where nothing is trained the sum is 0, and so the mean
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = (
                loss * self.accelerator.num_processes
            )  # gradients are averaged over ranks, and must be summed
        if heard:
            loss = loss + self._balance.share(
                heard, self.current_gradient_accumulation_steps, loss.device
            )
        return (loss, {"outputs": outputs}) if return_outputs else loss

    def _sums(
        self, model: nn.Module, inputs: Any, items: Tensor | int | None = None
    ) -> tuple[LossSums, Tensor]:
        """The sums of a batch of either kind, and what the model put out."""
        if self._collator is not None:
            sums, outputs = foreign_sums(model, inputs, self.loss_plan.kind)
        elif self.compute_loss_func is not None:
            outputs = all_logits(model, inputs, self.feeding)
            sums = loss_from_logits(
                outputs[0, inputs["scored"]], inputs["targets"], weights=inputs["weights"]
            )
        else:
            return self.row_sums(model, inputs)
        if self.compute_loss_func is None:
            return sums, outputs
        of_users: Tensor = self.compute_loss_func(
            CausalLMOutput(logits=outputs), inputs["labels"], num_items_in_batch=items
        )
        # It is divided by the step's items already; ours is divided later.
        return sums._replace(loss=of_users * (sums.weight if items is None else items)), outputs

    def _activations_kept(self, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
        if not (self.args.activation_offloading and model.training):
            return contextlib.nullcontext()
        return torch.autograd.graph.save_on_cpu(pin_memory=self.args.device.type == "cuda")

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """What all trained tokens of a step weigh together, over its rows and ranks; Trainer would
        count labels."""
        total = torch.tensor(
            sum(batch["total_weight"] for batch in batch_samples), dtype=torch.float32
        ).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = self.accelerator.gather(total).sum()
        share: Tensor = total / self.get_tp_size()
        return share  # ranks of tensor parallelism have the same rows

    # ---- training and logging ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """Train, from the start or from a checkpoint (a folder, or True for the newest complete one
        in output_dir).

        Raises InputNotFound or ConfigError where there is no such checkpoint, MismatchError where
        it is of another run, OutputBusy where another run writes to output_dir.
        """
        with self.output_held():
            self._refuse_together(
                partial(reject_to_train_in_place, self.args.output_dir, self._folders_read()),
                Path(self.args.output_dir),
            )
            self._refuse_output()
            folder = self._checkpoint_to_resume(resume_from_checkpoint)
            self.trained_tokens = self.trained_tokens_here = self.steps_before = 0
            if folder is not None:
                before = RunState.load(folder)
                self.run_state().reject_other_run(before, folder)
                self.trained_tokens = before.trained_tokens
                # Read now: the checkpoint may be deleted while the run goes on (save_total_limit).
                self.steps_before = read_step(folder)
            self._counters = Counters(self.args.device)
            self.resumed_from = folder
            if is_stream(self.train_dataset):
                # Its loader goes on by itself, and has passed nothing again.
                self.args.ignore_data_skip = True
            self._check_before_training()
            with noise_by_sequence(self.model, self._noise):
                result = super().train(resume_from_checkpoint=folder, **options)
            self._read_counters()  # what came after the last log
        return result

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The batches of a step and what they weigh, as Trainer does; none ends the pass.

        The length of a stream is not known, so Trainer would ask for `max_steps` more of them.
        """
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not samples:
            self.control.should_epoch_stop = True
        return samples, items

    def records_rejected(self) -> int:
        """Records of a stream that were set aside in its last pass, by this process."""
        counts = {} if self._stream is None else self._stream.counts
        return sum(count for name, count in counts.items() if name.startswith("rejected."))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add trained tokens, their speed and token accuracy to what is logged of
        training."""
        if "loss" in logs:
            reading = self._read_counters()
            logs = {
                **logs,
                "mean_token_accuracy": reading.accuracy,
                "num_tokens": self.trained_tokens,
                "tokens_per_second": reading.tokens_per_second,
                **self._balance.read(self.accelerator),
            }
        super().log(logs, start_time)

    def _read_counters(self) -> CounterReading:
        reading = self._counters.read(self.accelerator)
        self.trained_tokens += reading.tokens
        self.trained_tokens_here += reading.tokens
        return reading

    # ---- nothing that is not finite is trained on or saved ----

    def training_step(self, model: nn.Module, inputs: Any, *given: Any, **options: Any) -> Tensor:
        """Trainer's step on one device batch, whose loss is noted for `FiniteGuard`."""
        origins = inputs.get("origins", ()) if isinstance(inputs, Mapping) else ()
        loss: Tensor = super().training_step(model, inputs, *given, **options)
        self._finite.add_batch(loss, origins)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._finite.check_gradient(norm, self.state.global_step + 1)
        return norm

    def _maybe_log_save_evaluate(self, *given: Any, **options: Any) -> None:
        self._finite.check_step(self.state.global_step)
        super()._maybe_log_save_evaluate(*given, **options)

    # ---- evaluation ----

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Loss, perplexity and accuracy over all trained positions of an evaluation set, each
        counted once.

        eval_dataset: what the trainer takes as one, the name of one of its sets, or a mapping of
        names to such; raw records are prepared as evaluation sets are, packs are taken as they are.
        With several sets each has its own metrics, `eval_NAME_loss` and so on. ignore_keys is
        Trainer's, and not used.
        """
        chosen = eval_dataset if eval_dataset is not None else self.eval_dataset
        if isinstance(chosen, Mapping):
            metrics: dict[str, float] = {}
            for name, source in chosen.items():
                metrics.update(
                    self.evaluate(source, metric_key_prefix=f"{metric_key_prefix}_{name}")
                )
            return metrics
        predicting = self.compute_metrics is not None and not self.args.prediction_loss_only
        return self._evaluated(chosen, metric_key_prefix, predicting)[1]

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        """As `evaluate` on one set, with the predictions: a row a sequence, filled up with -100;
        see `sfttrain.metrics.predictions`."""
        predictions, metrics = self._evaluated(test_dataset, metric_key_prefix, True)
        assert predictions is not None
        return PredictionOutput(
            predictions=predictions.predictions, label_ids=predictions.label_ids, metrics=metrics
        )

    def _evaluated(
        self, chosen: Any, prefix: str, predicting: bool
    ) -> tuple[Any, dict[str, float]]:
        loader = self.get_eval_dataloader(self._prepared(chosen))
        predictions = Predictions(self.preprocess_logits_for_metrics) if predicting else None
        was = self.model.training
        self.model.eval()
        counters = Counters(self.args.device)
        with torch.no_grad(), self._evaluation_precision():
            for batch in loader:
                inputs: Any = self._prepare_inputs(cast(Any, batch))
                sums, outputs = (
                    self._sums(self.model, inputs)
                    if self._collator is not None
                    else self.row_sums(self.model, inputs)
                )
                counters.add(sums)
                if predictions is not None and self._collator is not None:
                    predictions.add(outputs, inputs["labels"], None)
                elif predictions is not None:
                    logits = all_logits(self.model, inputs, self.feeding)
                    predictions.add(logits, inputs["labels"], inputs["seq_lens"])
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
        gathered = predictions.gathered(self.args.world_size) if predictions is not None else None
        if self.compute_metrics is not None and gathered is not None:
            found.update(self.compute_metrics(gathered))
        metrics = {
            name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": value
            for name, value in found.items()
        }
        for name, value in metrics.items():
            finite = not isinstance(value, Real) or math.isfinite(value)
            if not finite and self.is_world_process_zero():
                logger.warning(
                    "%s is %s at step %d, which never counts as the best one",
                    *(name, value, self.state.global_step),
                )
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return gathered, metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether an evaluation is the best one so far; never with a value that is not finite."""
        name = f"eval_{str(self.args.metric_for_best_model).removeprefix('eval_')}"
        value = metrics.get(name)
        if isinstance(value, Real) and not math.isfinite(value):
            return False
        return bool(super()._determine_best_metric(metrics=metrics, trial=trial))

    def _prepared(self, chosen: Any) -> Any:
        """An evaluation set as it can be loaded: packs, or rows for the collator. One that is so
        already stays as it is."""
        named = (
            isinstance(chosen, str)
            and isinstance(self.eval_dataset, Mapping)
            and chosen in self.eval_dataset
        )
        sets = (
            self.eval_dataset.values()
            if isinstance(self.eval_dataset, Mapping)
            else [self.eval_dataset]
        )
        if chosen is None or named or is_packs(chosen) or any(chosen is source for source in sets):
            return chosen
        prepare = rows_for_collator if self._collator is not None else packs_for_evaluation
        return prepare(self._parts, chosen, "eval_dataset")

    def _evaluation_precision(self) -> Any:
        """The precision of training: before training, the model has not been wrapped for it."""
        return self.accelerator.autocast()
