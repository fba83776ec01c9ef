"""transformers' Trainer with the loss and the evaluation of packed rows.

A loss is always a sum over trained positions, divided once by the weight of all of them: of the
optimizer step in training, of the whole set in evaluation. So it does not depend on how sequences
are packed, batched, or distributed over ranks.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput
from transformers.trainer_utils import PredictionOutput

from sfttrain.data.batching import RowBatch
from sfttrain.data.custom_collator import Collator
from sfttrain.data.inputs import is_packs
from sfttrain.losses.collated_loss import collated_loss_sums
from sfttrain.losses.fused_cross_entropy import LossPlan, LossSums, loss_from_logits
from sfttrain.losses.router_aux import ExpertBalance
from sfttrain.metrics.predictions import Predictions, all_logits
from sfttrain.metrics.token_metrics import CounterReading, Counters
from sfttrain.packed.forward import ForwardMode, scored_outputs
from sfttrain.saving_trainer import SavingTrainer
from sfttrain.trainer_datasets import packs_for_evaluation, rows_for_collator

logger = logging.getLogger(__name__)


class ScoringTrainer(SavingTrainer):
    """The part of SFTTrainer for losses and evaluation."""

    feeding: ForwardMode
    """How rows are passed to the model."""
    loss_plan: LossPlan
    """How the loss is computed."""
    _balance: ExpertBalance
    """The loss that balances experts."""
    _collator: Collator | None
    """The user's collator; None for packs."""

    # ---- loss ----

    def row_sums(self, model: nn.Module, batch: RowBatch) -> tuple[LossSums, Tensor]:
        """Run the model on a packed row, and sum its loss over the trained positions.

        Returns:
            The sums, and the outputs from which they were computed: the logits [n, V] of the n
            trained positions, or their hidden states.
        """
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
        """Compute the share of a row in the mean loss of the step.

        The mean is over all rows and ranks of the step.

        Args:
            model: The model, possibly wrapped for several processes.
            inputs: The row, or a batch of the user's collator.
            return_outputs: Whether to return the outputs of the model as well.
            num_items_in_batch: The total weight of the trained tokens of the step (their number,
                without weights); None for the weight of this row.

        Example:
            A step of two rows with 30 and 10 trained tokens: the results are sum(losses) / 40 of
            each row, and Trainer adds their gradients.
        """
        with (
            self._offload_activations(model),
            self._balance.capture(model.training) as balance_losses,
        ):
            sums, outputs = self._compute_sums(model, inputs, num_items_in_batch)
        if model.training:
            self._counters.add(sums)
        items = (
            sums.weight
            if num_items_in_batch is None
            else torch.as_tensor(num_items_in_batch, device=sums.loss.device)
        )
        # If nothing is trained, the sum is 0, and the mean must be 0 and not NaN.
        loss = sums.loss / torch.where(items == 0, 1, items)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The gradients are averaged over the ranks, but must be summed.
            loss = loss * self.accelerator.num_processes
        if balance_losses:
            accumulation = self.current_gradient_accumulation_steps
            loss = loss + self._balance.share(balance_losses, accumulation, loss.device)
        return (loss, {"outputs": outputs}) if return_outputs else loss

    def _compute_sums(
        self, model: nn.Module, inputs: Any, items: Tensor | int | None = None
    ) -> tuple[LossSums, Tensor]:
        """Return the sums of a row or a collator's batch, and the model's outputs."""
        if self._collator is not None:
            sums, outputs = collated_loss_sums(model, inputs, self.loss_plan.kind)
        elif self.compute_loss_func is not None:
            outputs = all_logits(model, inputs, self.feeding)
            sums = loss_from_logits(
                outputs[0, inputs["scored"]], inputs["targets"], weights=inputs["weights"]
            )
        else:
            return self.row_sums(model, inputs)
        if self.compute_loss_func is None:
            return sums, outputs
        user_loss: Tensor = self.compute_loss_func(
            CausalLMOutput(logits=outputs), inputs["labels"], num_items_in_batch=items
        )
        # The user's function has divided by the items already, and compute_loss divides again.
        return sums._replace(loss=user_loss * (sums.weight if items is None else items)), outputs

    def _offload_activations(self, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
        if not (self.args.activation_offloading and model.training):
            return contextlib.nullcontext()
        return torch.autograd.graph.save_on_cpu(pin_memory=self.args.device.type == "cuda")

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """Return the total weight of the trained tokens of a step.

        The total is over the rows and ranks of the step.

        Trainer would count labels.
        """
        total = torch.tensor(
            sum(batch["total_weight"] for batch in batch_samples), dtype=torch.float32
        ).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = self.accelerator.gather(total).sum()
        share: Tensor = total / self.get_tp_size()  # ranks of tensor parallelism have equal rows
        return share

    # ---- evaluation ----

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Compute the loss, perplexity and accuracy of an evaluation set.

        They are means over all trained positions, each of which is counted once.

        Args:
            eval_dataset: Anything that the trainer accepts as one, the name of one of its sets, or
                a mapping of names to sets; by default the sets of the trainer. Raw records are
                prepared, packs are used unchanged. Each of several sets has metrics of its own,
                such as `eval_NAME_loss`.
            ignore_keys: Not used; for compatibility with Trainer.
            metric_key_prefix: The prefix of the metrics.

        Returns:
            The metrics by name.
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
        return self._evaluate_set(chosen, metric_key_prefix, predicting)[1]

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        """Evaluate one set, and return its predictions as well.

        They have a row per sequence, padded with -100 (see `sfttrain.metrics.predictions`). The
        arguments are those of `evaluate`.
        """
        predictions, metrics = self._evaluate_set(test_dataset, metric_key_prefix, True)
        assert predictions is not None
        return PredictionOutput(
            predictions=predictions.predictions, label_ids=predictions.label_ids, metrics=metrics
        )

    def _evaluate_set(
        self, chosen: Any, prefix: str, predicting: bool
    ) -> tuple[Any, dict[str, float]]:
        """Evaluate one set.

        Returns:
            The predictions, gathered over the ranks (or None), and the metrics.
        """
        loader = self.get_eval_dataloader(self._prepare_eval_set(chosen))
        predictions = Predictions(self.preprocess_logits_for_metrics) if predicting else None
        was_training = self.model.training
        self.model.eval()
        counters = Counters(self.args.device)
        # Before training, the model is not wrapped for mixed precision yet.
        with torch.no_grad(), self.accelerator.autocast():
            for batch in loader:
                inputs: Any = self._prepare_inputs(cast(Any, batch))
                # The user's loss function is for training: packs are always evaluated with ours.
                sums, outputs = (
                    self._compute_sums(self.model, inputs)
                    if self._collator is not None
                    else self.row_sums(self.model, inputs)
                )
                counters.add(sums)
                if predictions is not None and self._collator is not None:
                    predictions.add(outputs, inputs["labels"], None)
                elif predictions is not None:
                    logits = all_logits(self.model, inputs, self.feeding)
                    predictions.add(logits, inputs["labels"], inputs["seq_lens"])
        self.model.train(was_training)
        metrics = _to_metrics(counters.read(self.accelerator))
        gathered = predictions.gather(self.args.world_size) if predictions is not None else None
        if self.compute_metrics is not None and gathered is not None:
            metrics.update(self.compute_metrics(gathered))
        metrics = {
            name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": value
            for name, value in metrics.items()
        }
        self._warn_of_non_finite(metrics)
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return gathered, metrics

    def _warn_of_non_finite(self, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            is_finite = not isinstance(value, Real) or math.isfinite(value)
            if not is_finite and self.is_world_process_zero():
                logger.warning(
                    "%s is %s at step %d, which never counts as the best one",
                    *(name, value, self.state.global_step),
                )

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Return whether an evaluation is the best one so far.

        A non-finite value is never the best one.
        """
        name = f"eval_{str(self.args.metric_for_best_model).removeprefix('eval_')}"
        value = metrics.get(name)
        if isinstance(value, Real) and not math.isfinite(value):
            return False
        return bool(super()._determine_best_metric(metrics=metrics, trial=trial))

    def _prepare_eval_set(self, chosen: Any) -> Any:
        """Return an evaluation set as packs, or as rows for the collator.

        The trainer's own sets are prepared already and returned unchanged, as are packs.
        """
        is_named = (
            isinstance(chosen, str)
            and isinstance(self.eval_dataset, Mapping)
            and chosen in self.eval_dataset
        )
        sets = (
            self.eval_dataset.values()
            if isinstance(self.eval_dataset, Mapping)
            else [self.eval_dataset]
        )
        is_own_set = any(chosen is source for source in sets)
        if chosen is None or is_named or is_packs(chosen) or is_own_set:
            return chosen
        prepare = rows_for_collator if self._collator is not None else packs_for_evaluation
        return prepare(self._parts, chosen, "eval_dataset")


def _to_metrics(reading: CounterReading) -> dict[str, Any]:
    return {
        "loss": reading.loss,
        "perplexity": reading.perplexity,
        "mean_token_accuracy": reading.accuracy,
        "num_tokens": reading.tokens,
        "runtime": round(reading.seconds, 4),
        "tokens_per_second": round(reading.tokens_per_second, 1),
    }
