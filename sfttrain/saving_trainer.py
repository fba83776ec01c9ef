"""transformers' Trainer with complete and finite checkpoints in its own folders.

`checkpoints/` decides which files a run may replace and delete, and `finite.py` checks values. This
module calls them before training, at each save, at the end, and at a resume.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sftprep.config import check_local_path
from sftprep.errors import TrainingDiverged
from sfttrain.checkpoints.contents import last_optimizer_step
from sfttrain.checkpoints.loading import (
    best_checkpoint_error,
    expected_tensors,
    has_adapter,
    load_converted_weights,
    mismatch_errors,
)
from sfttrain.checkpoints.output_folders import (
    list_checkpoints,
    reject_to_replace,
    rotate_checkpoints,
    save_errors,
)
from sfttrain.checkpoints.output_guard import OutputGuard
from sfttrain.checkpoints.own_files import begin_folder, begin_output
from sfttrain.checkpoints.pushing import PushingTrainer
from sfttrain.checkpoints.resumed_settings import (
    list_group_settings,
    reject_other_optimizer,
    settings_to_record,
    warn_of_changes,
)
from sfttrain.checkpoints.seal import Needs, find_saved_fault, seal_checkpoint
from sfttrain.checkpoints.select import RunState, find_checkpoint, is_resume_requested
from sfttrain.data.step_plan import StepPlan
from sfttrain.data.streaming import TrainLoader, is_stream
from sfttrain.finite import FiniteGuard, all_tensors, format_names, names_not_finite, saved_tensors
from sfttrain.metrics.token_metrics import Counters
from sfttrain.models.unwrap import unwrap_peft
from sfttrain.trainer_datasets import TrainerParts

logger = logging.getLogger(__name__)


class SavingTrainer(PushingTrainer):
    """The saving and resuming part of SFTTrainer.

    Args:
        parts: The model, the datasets and the settings of the trainer.
        options: The arguments of Trainer.
    """

    def __init__(self, parts: TrainerParts, **options: Any) -> None:
        self._parts = parts
        super().__init__(**options)
        # The loader of the training stream; None for other data or before training.
        self._stream: TrainLoader | None = None
        # The repository and commit of the code that trust_remote_code runs, for the checkpoints.
        self.code = ""
        # The folder of the checkpoint from which this call of train() resumed.
        self.resumed_from: str | None = None
        # The targets seen over all ranks until the last log entry, including those before a resume.
        self.trained_tokens = 0
        # The counters since the last log entry.
        self._counters = Counters(self.args.device)
        self._output = OutputGuard(self)
        self._finite = FiniteGuard(self.accelerator, self._row_name, lambda: self.model)
        # The names of the checkpoints that this trainer has written.
        self._written_names: set[str] = set()

    def step_plan(self) -> StepPlan:
        """Return the plan of the packs for each step."""
        raise NotImplementedError

    def _row_name(self, origin: int) -> str:
        """Return the file and line of a sequence's record, or its row in the dataset."""
        source = self.train_dataset
        # Streams locate an origin themselves, and for the packs of a build, its manifest does.
        locate = getattr(
            getattr(source, "manifest", None), "locate", getattr(source, "locate", None)
        )
        try:
            file, line = locate(origin) if locate is not None else ("", 0)
        except IndexError:
            file = ""
        if not file:  # the packs do not record their origin
            return f"sequence {origin}"
        is_ours = self._parts.preparation.is_cached_rows(file)
        return f"{'train_dataset' if is_ours else file}:{line}"

    # ---- before and between steps ----

    def _folders_read(self) -> set[str]:
        """Return the names of the starting model, tokenizer and adapter."""
        config = unwrap_peft(self.model).config
        adapters = getattr(self.model, "peft_config", None) or {}
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        names = {
            self._parts.name,
            getattr(config, "_name_or_path", None),
            getattr(tokenizer, "name_or_path", None),
            self.args.chat_template_path,
            *(getattr(adapter, "base_model_name_or_path", None) for adapter in adapters.values()),
        }
        return {str(name) for name in names if name}

    def _check_before_training(self) -> None:
        """Refuse to train if a save would fail; warn if merging would fail."""
        names = names_not_finite(all_tensors(self.model))
        self._finite.bad_before = frozenset(names)
        self._finite.good_step = None if self.resumed_from else 0
        if not names:
            return
        if saved_names := names_not_finite(saved_tensors(self.model)):
            raise TrainingDiverged(
                f"the model is not finite before training{format_names(saved_names)}, so it could"
                " not be saved",
                remedy="check the model's files: they were probably saved after training diverged",
            )
        logger.warning(
            "the base model is not finite before training%s: as long as it is not, no adapter can "
            "be merged into it",
            format_names(names),
        )

    def _run_epoch(self, *arguments: Any, **options: Any) -> None:
        """Run one pass unless max_steps are done; Trainer checks this after a step."""
        step, last = self.state.global_step, self.args.max_steps
        if 0 < last <= step:
            logger.warning("step %d of %d: nothing is left to train", step, last)
            self.control.should_training_stop = True
            return
        self._check_checkpoint_folders()
        super()._run_epoch(*arguments, **options)

    def _check_checkpoint_folders(self) -> None:
        """Refuse to train if a checkpoint of a known step could not be saved."""
        state = self.state
        if not self.args.should_save or self.args.save_strategy != "steps":
            return
        for step, folder in sorted(list_checkpoints(self._get_output_dir(None)).items()):
            is_due = step % max(state.save_steps, 1) == 0 or step == state.max_steps
            if state.global_step < step <= state.max_steps and is_due:
                reject_to_replace(folder)

    @contextlib.contextmanager
    def output_held(self) -> Iterator[None]:
        """Keep other runs out of the output folder, even ranks unknown to each other.

        Blocks can be nested: the outermost one holds the lock, so one block can contain `train` and
        the final save and evaluation.

        Raises:
            OutputBusy: Another run writes to the folder.
        """
        # The trials of a hyperparameter search have folders of their own below it.
        if not self.is_world_process_zero() or self.hp_search_backend is not None:
            yield
            return
        with self._output.lock():
            yield

    # ---- resuming ----

    def _checkpoint_to_resume(self, requested: str | bool | None) -> str | None:
        """Return the checkpoint for a resume after its check; None for none."""
        if requested is None or not is_resume_requested(requested):
            return None
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        needs = Needs(
            ranks=self.args.world_size,
            stream=is_stream(self.train_dataset),
            adapter=unwrap_peft(self.model) is not self.model,
            optimizer=not self.args.save_only_model,
            tensors=None if is_sharded else expected_tensors(self.model),
        )
        # All files are read, so one process of each machine does it for the others.
        find = partial(find_checkpoint, requested, self.args.output_dir, needs=needs)
        folder = self._parts.preparation.once.do(find)
        if not needs.optimizer:
            logger.warning(
                "checkpoints with save_only_model have no optimizer and no schedule: both start "
                "from the beginning, with the weights of %s",
                folder,
            )
        return folder

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the weights of a checkpoint of this model."""
        with mismatch_errors(resume_from_checkpoint, "weights"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            self._load_converted(resume_from_checkpoint, self.model if model is None else model)

    def _load_best_model(self) -> None:
        """Load the weights of the best checkpoint, after a check of its files."""
        folder = Path(str(self.state.best_model_checkpoint))
        # All files are read, so one process of each machine does it for the others.
        fault = self._parts.preparation.once.do(partial(find_saved_fault, folder))
        if fault:
            raise best_checkpoint_error(folder, fault)
        super()._load_best_model()
        self._load_converted(str(self.state.best_model_checkpoint), self.model)

    def _load_converted(self, folder: str, model: Any) -> None:
        if not (has_adapter(model) or self.is_fsdp_enabled or self.is_deepspeed_enabled):
            load_converted_weights(folder, model)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with mismatch_errors(checkpoint, "random states"):
            super()._load_rng_state(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with mismatch_errors(checkpoint, "scaler"):
            super()._load_scaler(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Restore the optimizer and the schedule; log the settings without an effect."""
        if checkpoint is None or self.args.save_only_model:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        recorded = RunState.load(checkpoint).settings
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        path = Path(checkpoint) / "optimizer.pt"
        with mismatch_errors(checkpoint, "optimizer and schedule"):
            configured = [] if is_sharded else list_group_settings(self.optimizer)
            if not is_sharded:
                # Only checkpoints of older versions do not record the kind of their optimizer.
                is_recorded = "optimizer" in recorded or not path.is_file()
                saved = None if is_recorded else torch.load(path, weights_only=True, mmap=True)
                reject_other_optimizer(recorded, saved, self.args, self.optimizer, checkpoint)
            super()._load_optimizer_and_scheduler(checkpoint)
            if not is_sharded and self.is_world_process_zero():
                warn_of_changes(recorded, self.args, configured, self.optimizer)

    # ---- checkpoints ----

    def run_state(self, step: int) -> RunState:
        """Return the state of the run after a step, for a comparison with that of a checkpoint."""
        source = self.train_dataset
        identity = source.identity if is_stream(source) else ""
        return RunState(
            data=str(getattr(getattr(source, "manifest", None), "data_digest", identity)),
            packing=getattr(source, "plan_settings", {}),
            build=str(getattr(source, "root", "")),
            trained_tokens=self.trained_tokens,
            code=self.code,
            ranks=self.args.world_size,
            **self.step_plan().state(step),
        )

    def _state_to_save(self) -> RunState:
        """Return the state of the run for the current checkpoint."""
        # A run that resumes from here has seen the tokens since the last log entry as well. The
        # counters are only peeked at, because the next log entry needs them too.
        total = self.trained_tokens + self._counters.peek(self.accelerator).tokens
        counted = {
            "trainer": self.state.global_step,
            "optimizer": last_optimizer_step(getattr(self.optimizer, "state", {}).values()),
            "schedule": getattr(self.lr_scheduler, "last_epoch", None),
        }
        return dataclasses.replace(
            self.run_state(self.state.global_step),
            trained_tokens=total,
            steps={name: step for name, step in counted.items() if isinstance(step, int)},
            settings=settings_to_record(self.args, self.optimizer),
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint: mark the folder, write and seal the files, delete old ones."""
        optimizer = None if self.args.save_only_model else self.optimizer
        self._finite.check_saved(self.model, self.state.global_step, optimizer)
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        if folder.name not in self._written_names:
            self._output.reject_together(partial(reject_to_replace, folder), folder)
        run_state = self._state_to_save()  # on all ranks, because it sums over them
        with save_errors(folder), self._hide_save_limit() as limit:
            if self.args.should_save:
                begin_folder(folder)
                run_state.save(folder)
                self._written_names.add(folder.name)
            self.accelerator.wait_for_everyone()
            if self._stream is not None:
                self._stream.save(str(folder), self.args.process_index, self.args.world_size)
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # each process writes files of its own
            if not self.args.should_save:
                return
            seal_checkpoint(folder)
            if limit is not None and limit > 0:
                best = self.state.best_model_checkpoint
                protected = {folder.name, *([Path(best).name] if best else [])}
                rotate_checkpoints(
                    folder.parent, limit, protected=protected, own_names=self._written_names
                )

    def _finalize_training(self, *arguments: Any, **options: Any) -> Any:
        with self._hide_save_limit() as limit:
            result = super()._finalize_training(*arguments, **options)
        best = self.state.best_model_checkpoint
        # As in Trainer: the newest checkpoint was kept for a resume, which is not needed any more.
        if self.args.should_save and limit == 1 and best is not None:
            protected = {Path(best).name}
            rotate_checkpoints(
                Path(best).parent, 1, protected=protected, own_names=self._written_names
            )
        return result

    @contextlib.contextmanager
    def _hide_save_limit(self) -> Iterator[int | None]:
        """Yield save_total_limit, hidden from Trainer: it would delete other folders."""
        self._hidden_limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield self._hidden_limit
        finally:
            self.args.save_total_limit, self._hidden_limit = self._hidden_limit, None

    # ---- the final model ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model or adapter, as Trainer does.

        Raises:
            TrainingDiverged: A tensor is not finite; nothing is written in this case.
            OutputExists: The output folder has files of a model that sfttrain did not write.
        """
        if _internal_call:  # for a checkpoint or a push, which have been checked
            super().save_model(output_dir, _internal_call=True)
            return
        self._finite.check_saved(self.model, self.state.global_step)
        folder = Path(output_dir or str(self.args.output_dir))
        check_local_path(os.fspath(output_dir or folder), "the folder")
        is_final_output = folder.resolve() == self._output.folder.resolve()
        if is_final_output:
            self._output.prepare_save()
        with save_errors(folder):
            if is_final_output and self.args.should_save:
                begin_output(folder)
            super().save_model(output_dir)
            if is_final_output:
                self._output.seal()

    def save_state(self) -> None:
        """Save Trainer's state in the output folder; the errors are those of `save_model`."""
        self._output.prepare_save()
        super().save_state()
        self._output.seal()

    def create_model_card(self, *arguments: Any, **options: Any) -> None:
        """Write README.md in the output folder; the errors are those of `save_model`."""
        self._output.prepare_save()
        super().create_model_card(*arguments, **options)
        self._output.seal()

    def push_to_hub(self, *arguments: Any, **options: Any) -> Any:
        """Save the model or adapter and upload it, as Trainer does.

        Raises:
            TrainingDiverged: A tensor is not finite; nothing is written or uploaded in this case.
            OutputExists: The output folder has files of a model that sfttrain did not write.
            HubError: The Hub cannot be reached, or refuses.
        """
        self._finite.check_saved(self.model, self.state.global_step)
        self._output.prepare_save()
        return super().push_to_hub(*arguments, **options)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        with self.arguments_to_pickle():
            super()._save(output_dir, state_dict)
