"""SFTTrainer: transformers' Trainer for packed rows.

The training loop, the optimizer and the trackers are those of Trainer. The order of the packs, the
attention, the loss, the evaluation and the checkpoints are sfttrain's:

- this module: construction, loading of rows, training, logging;
- `scoring_trainer`: loss and evaluation;
- `saving_trainer`: checkpoints, resuming, the final model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from sftprep import Shards
from sftprep.errors import ConfigError, setting
from sfttrain.checkpoints.output_folders import reject_to_train_in_place
from sfttrain.checkpoints.select import RunState, read_step
from sfttrain.data.batching import PackLoader, StepSampler, collate_filled, collate_packs
from sfttrain.data.custom_collator import Collator, collate_custom
from sfttrain.data.prepare import max_sequence_length
from sfttrain.data.step_plan import BuildOrder, StepPlan
from sfttrain.data.streaming import TrainLoader, is_stream, reject_evaluation
from sfttrain.losses.fused_cross_entropy import LossPlan, plan_loss
from sfttrain.losses.router_aux import ExpertBalance
from sfttrain.metrics.predictions import Preprocess
from sfttrain.metrics.token_metrics import CounterReading, Counters
from sfttrain.models.unwrap import unwrap_peft
from sfttrain.packed.attention import resolve_attention
from sfttrain.packed.forward import ForwardMode
from sfttrain.packed.neftune import noise_by_sequence
from sfttrain.scoring_trainer import ScoringTrainer
from sfttrain.trainer_setup import resolve_trainer_parts


class SFTTrainer(ScoringTrainer):
    """Trainer for fine-tuning a causal language model, with TRL's arguments.

    Args:
        model: A transformers model, a PeftModel, or the folder or Hub name of a model.
        args: An SFTConfig.
        data_collator: Makes whole batches of rows, instead of sfttrain; nothing is packed then.
        train_dataset: Raw records: a datasets.Dataset or IterableDataset, a list of dictionaries,
            or the path of a file. sftprep prepares them once and keeps them in its cache. Or packs:
            the folder of a build, the result of `sftprep.open_shards`, or another `PackSource`;
            they are used unchanged, whatever `args` specifies about packing.
        eval_dataset: The same, or a mapping of names to such sets.
        processing_class: The tokenizer, or a processor that has one; by default the model's own. It
            is saved with the model.
        compute_loss_func: Your own loss function, called with the logits of whole rows as
            `compute_loss_func(outputs, labels, num_items_in_batch)`.
        compute_metrics: See `sfttrain.metrics.predictions`.
        callbacks: As in Trainer.
        optimizers: As in Trainer.
        optimizer_cls_and_kwargs: As in Trainer.
        preprocess_logits_for_metrics: See `sfttrain.metrics.predictions`.
        quantization_config: The quantization of a model that is specified by name.
        peft_config: A peft.LoraConfig, to train an adapter.
        formatting_func: Returns the text of a row.

    Raises:
        AttentionError: Packed sequences cannot be kept apart.
        ConfigError: The arguments contradict each other.
        SftprepError: The model cannot be loaded, or the data cannot be prepared.

    Example:
        trainer = SFTTrainer(
            "facebook/opt-350m",
            SFTConfig(output_dir="out", max_length=512, packing=True),
            train_dataset=[{"text": "The sky is blue."}, {"text": "The sea is wide."}],
        )
        trainer.train()
    """

    # The loss is divided by the trained tokens of the whole step, so Trainer must not divide it by
    # the number of micro-batches again.
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
        if compute_loss_func is not None and parts.args.loss_type != "nll":
            raise ConfigError(
                f"compute_loss_func and {setting('loss_type', parts.args.loss_type)} specify"
                " different losses",
                remedy="leave one of them out",
            )
        super().__init__(
            parts,
            model=parts.model,
            args=parts.args,
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
        self._set_up_training()

    def _set_up_training(self) -> None:
        """Choose the attention and the loss, and initialize the state of training."""
        # Trainer counts the trained tokens of a step only for models whose forward() accepts the
        # count; here the loss needs it.
        self.model_accepts_loss_kwargs = True
        # The noise of Trainer is scaled by the length of the row. Ours, which is scaled by the
        # length of each sequence, is switched on in train().
        self._noise, self.neftune_noise_alpha = self.args.neftune_noise_alpha, None
        self.feeding, self.loss_plan = self._resolve_feeding()
        # The order of the packs of a build; None for other data.
        self._build_order: BuildOrder | None = None
        if isinstance(self.train_dataset, Shards):
            self._build_order = BuildOrder.of(
                self.train_dataset,
                self._parts.preparation.once.count_machines(),
                unwrap_peft(self.model).config,
            )
        # The optimizer steps of the run before this call of train().
        self.steps_before = 0
        self._balance = ExpertBalance(self.model, self.args.router_aux_loss_coef)
        # The trained tokens of this call of train().
        self.trained_tokens_here = 0

    # ---- loading of rows ----

    def _resolve_feeding(self) -> tuple[ForwardMode, LossPlan]:
        """Choose the forward mode, verified on the model, and the loss."""
        args: Any = self.args
        if self._collator is not None:
            # The batches of a user's collator are padded, and passed to the model unchanged.
            implementation = str(unwrap_peft(self.model).config._attn_implementation)
            return ForwardMode.from_model(self.model, implementation, unpack=True), LossPlan(
                args.loss_type
            )
        sets = (
            list(self.eval_dataset.values())
            if isinstance(self.eval_dataset, Mapping)
            else [self.eval_dataset]
        )
        reject_evaluation(sets)
        longest = max(
            (
                max_sequence_length(source)
                for source in [self.train_dataset, *sets]
                if source is not None
            ),
            default=0,
        )
        autocast_dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
        feeding: ForwardMode = resolve_attention(
            self.model,
            self._parts.attention,
            longest=longest,
            autocast=autocast_dtypes.get(args.mixed_precision),
            guard=args.isolation_guard,
        )
        # The fused loss needs the whole weights of the head, and does not work with torch.compile.
        is_fusable = not (self.is_fsdp_enabled or self.is_deepspeed_enabled or args.torch_compile)
        return feeding, plan_loss(self.model, args.loss_impl, args.loss_type, fusable=is_fusable)

    def step_plan(self) -> StepPlan:
        """Return the plan of the packs for each step."""
        args = self.args
        return StepPlan(
            packs=0 if is_stream(self.train_dataset) else len(self.train_dataset),
            rows=self._train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            world=args.world_size,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            shuffle=args.train_sampling_strategy != "sequential",
            drop_last=args.dataloader_drop_last,
            build=self._build_order,
        )

    def get_train_dataloader(self) -> PackLoader | TrainLoader:
        """Return the loader of this rank's packs, in the order of the plan or stream.

        Raises:
            ConfigError: The trainer has no train_dataset.
        """
        if self.train_dataset is None:
            raise ConfigError("there is nothing to train on", remedy="specify train_dataset")
        if is_stream(self.train_dataset):
            rows, collate = self._train_batch_size, self._collate_function(self.train_dataset)
            self._stream = TrainLoader(self.train_dataset, self.args, rows, collate)
            if self.resumed_from is not None:
                self._stream.restore(self.resumed_from)
            return self._stream
        return self._create_loader(self.train_dataset, self.step_plan())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> PackLoader:
        """Return the loader of this rank's share of an evaluation set, in its order.

        Args:
            eval_dataset: Packs, or the name of one of the trainer's sets; by default its only set.

        Raises:
            ConfigError: There is no evaluation set.
        """
        chosen = eval_dataset if eval_dataset is not None else self.eval_dataset
        if isinstance(chosen, str):
            chosen = self.eval_dataset[chosen]
        if chosen is None:
            raise ConfigError("there is nothing to evaluate on", remedy="specify eval_dataset")
        rows = self.args.per_device_eval_batch_size
        return self._create_loader(
            chosen,
            StepPlan(packs=len(chosen), rows=rows, world=self.args.world_size, shuffle=False),
        )

    def _create_loader(self, source: Any, plan: StepPlan) -> PackLoader:
        args = self.args
        workers = args.dataloader_num_workers
        options: dict[str, Any] = {
            "pin_memory": args.dataloader_pin_memory and args.device.type == "cuda"
        }
        # torch refuses these options without workers.
        if workers:
            options["prefetch_factor"] = args.dataloader_prefetch_factor
            options["multiprocessing_context"] = args.dataloader_multiprocessing_context
            options["in_order"] = args.dataloader_in_order
        return PackLoader(
            source,
            StepSampler(plan, args.process_index),
            collate=self._collate_function(source),
            workers=workers,
            **options,
        )

    def _collate_function(self, source: Any) -> Callable[[list[Any]], Any]:
        if self._collator is not None:
            return partial(collate_custom, collator=self._collator, spare=source[0])
        multiple = self.args.pad_to_multiple_of
        if multiple is None:
            return collate_packs
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        return partial(
            collate_filled,
            multiple=multiple,
            pad_token_id=getattr(tokenizer, "pad_token_id", None) or 0,
        )

    # ---- training and logging ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """Train, from the start or from a checkpoint.

        Args:
            resume_from_checkpoint: A folder, or True for the newest complete checkpoint in
                `output_dir`.
            options: The other arguments of Trainer.train.

        Raises:
            InputNotFound: The checkpoint does not exist.
            ConfigError: The checkpoint is not complete.
            MismatchError: The checkpoint is of another run.
            OutputBusy: Another run writes to `output_dir`.
            OutputExists: The run would replace files that sfttrain did not write.
            TrainingDiverged: The loss, the gradient or a weight is not finite.
        """
        with self.output_held():
            # 1. Check the output folder before hours of training, on all ranks together.
            self._output.reject_together(
                partial(reject_to_train_in_place, self.args.output_dir, self._folders_read()),
                Path(self.args.output_dir),
            )
            self._output.check()
            # 2. Compare the checkpoint with this run, and continue its counters.
            folder = self._checkpoint_to_resume(resume_from_checkpoint)
            self.trained_tokens = self.trained_tokens_here = self.steps_before = 0
            if folder is not None:
                before = RunState.load(folder)
                if self._build_order is not None and before.lanes:
                    self._build_order = self._build_order.with_lanes(before.lanes)
                # Read now, because save_total_limit can delete the checkpoint during the run.
                self.steps_before = read_step(folder)
                self.run_state(self.steps_before).reject_other_run(before, folder)
                self.trained_tokens = before.trained_tokens
            self._counters = Counters(self.args.device)
            self.resumed_from = folder
            if is_stream(self.train_dataset):
                # The loader restores its own position: Trainer must not skip batches.
                self.args.ignore_data_skip = True
            self._check_before_training()
            # 3. Train.
            with noise_by_sequence(self.model, self._noise):
                result = super().train(resume_from_checkpoint=folder, **options)
            self._read_counters()  # the tokens since the last log entry
        return result

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Return the batches of a step and their weight, as Trainer does.

        Without a batch, the pass ends.

        The length of a stream is unknown, so Trainer would request `max_steps` more steps of it.
        """
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not samples:
            self.control.should_epoch_stop = True
        return samples, items

    def records_rejected(self) -> int:
        """Return the number of stream records quarantined in the last pass.

        Only the records of this process are counted.
        """
        counts = {} if self._stream is None else self._stream.counts
        return sum(count for name, count in counts.items() if name.startswith("rejected."))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the trained tokens, their speed and the accuracy for training."""
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

    # ---- checks for finite values ----

    def training_step(
        self, model: nn.Module, inputs: Any, *arguments: Any, **options: Any
    ) -> Tensor:
        """Run Trainer's step on one device batch, and record its loss for `FiniteGuard`."""
        origins = inputs.get("origins", ()) if isinstance(inputs, Mapping) else ()
        loss: Tensor = super().training_step(model, inputs, *arguments, **options)
        self._finite.add_batch(loss, origins)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Trainer calls this after all micro-batches of a step, and before the optimizer's step.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._finite.check_gradient(norm, self.state.global_step + 1)
        return norm

    def _maybe_log_save_evaluate(self, *arguments: Any, **options: Any) -> None:
        # Before a checkpoint of this step can be written.
        self._finite.check_step(self.state.global_step)
        super()._maybe_log_save_evaluate(*arguments, **options)
