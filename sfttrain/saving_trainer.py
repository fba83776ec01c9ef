"""transformers' Trainer whose checkpoints are complete, finite and in folders of their own.

What a run may replace and delete is decided by `checkpoints/`, and what is finite by `finite.py`;
this is where Trainer asks them: before training, at each save, at the end, and at a resume.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import pickle
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from sftprep.errors import ConfigError, MismatchError, OutputExists, TrainingDiverged
from sftprep.shards import exclusive, storage_errors
from sfttrain.checkpoints.contents import ExpectedTensors, last_optimizer_step
from sfttrain.checkpoints.output_folders import (
    list_checkpoints,
    reject_foreign_output,
    reject_to_replace,
    rotate_checkpoints,
    save_errors,
)
from sfttrain.checkpoints.own_files import begin_folder, begin_output, seal_output
from sfttrain.checkpoints.resumed_settings import (
    list_group_settings,
    reject_other_optimizer,
    settings_to_record,
    warn_of_changes,
)
from sfttrain.checkpoints.seal import Needs, find_saved_fault, seal_checkpoint
from sfttrain.checkpoints.select import (
    RunState,
    find_checkpoint,
    is_resume_requested,
)
from sfttrain.data.batching import (
    StepPlan,
)
from sfttrain.data.streaming import TrainLoader, is_stream
from sfttrain.finite import (
    FiniteGuard,
    adapter_tensors,
    all_tensors,
    format_names,
    names_not_finite,
    saved_tensors,
)
from sfttrain.metrics.token_metrics import Counters
from sfttrain.models.unwrap import unwrap_peft
from sfttrain.trainer_datasets import TrainerParts

logger = logging.getLogger(__name__)


class SavingTrainer(Trainer):  # type: ignore[misc]
    """Resumes and saves for SFTTrainer, which knows how to feed a model and what its loss is.

    parts: what the trainer was given, settled; options: those of Trainer.
    """

    def __init__(self, parts: TrainerParts, **options: Any) -> None:
        self._parts = parts
        super().__init__(**options)
        self._stream: TrainLoader | None = None
        self.code = ""
        """Whose code --trust_remote_code runs, and of which commit; for the checkpoints."""
        self.resumed_from: str | None = None
        """Folder of the checkpoint that this call of train() resumed from."""
        self.trained_tokens = 0
        """Targets seen over all ranks, those before a resume included; up to the last log."""
        self._counters = Counters(self.args.device)
        self._holds_output = False
        self._output_checked = False
        """Whether the top of the output folder has been found to be free for the final model."""
        self._finite = FiniteGuard(self.accelerator, self._row_name, lambda: self.model)
        self._written: set[str] = set()
        """Names of the checkpoints that this trainer has written."""
        self._limit: int | None = None
        """save_total_limit, while it is hidden from Trainer."""

    def step_plan(self) -> StepPlan:
        """Which packs each step trains on."""
        raise NotImplementedError

    def _row_name(self, origin: int) -> str:
        """File and line of the record of a sequence, or row of the dataset."""
        source = self.train_dataset
        locate = getattr(
            source, "locate", getattr(getattr(source, "manifest", None), "locate", None)
        )
        try:
            file, line = locate(origin) if locate is not None else ("", 0)
        except IndexError:
            file = ""
        if not file:  # packs that do not know where they come from
            return f"sequence {origin}"
        own = self._parts.preparation.holds_rows(file)
        return f"{'train_dataset' if own else file}:{line}"

    # ---- before and between steps ----

    def _folders_read(self) -> set[str]:
        """Names of the model, tokenizer and adapter that the run is started from."""
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
        """Refuse to train what could not be saved; warn of a base that could not be merged."""
        names = names_not_finite(all_tensors(self.model))
        self._finite.bad_before = frozenset(names)
        self._finite.good_step = None if self.resumed_from else 0
        if not names:
            return
        if kept := names_not_finite(saved_tensors(self.model)):
            raise TrainingDiverged(
                f"the model is not finite before training{format_names(kept)}, so nothing of it could be"
                " saved",
                remedy="check the file of the model; it was probably saved after training diverged",
            )
        logger.warning(
            "the base model is not finite before training%s: while it is not, no adapter can be"
            " merged into it",
            format_names(names),
        )

    def _run_epoch(self, *given: Any, **options: Any) -> None:
        """A pass; none where max_steps are done already, which Trainer asks after a step only."""
        if 0 < self.args.max_steps <= self.state.global_step:
            logger.warning(
                "step %d of %d: nothing is left to train",
                self.state.global_step,
                self.args.max_steps,
            )
            self.control.should_training_stop = True
            return
        self._check_folders_to_write()
        super()._run_epoch(*given, **options)

    def _check_folders_to_write(self) -> None:
        """Refuse to train where a checkpoint could not be saved, as far as its step is known."""
        state = self.state
        if not self.args.should_save or self.args.save_strategy != "steps":
            return
        for step, folder in sorted(list_checkpoints(self._get_output_dir(None)).items()):
            due = step % max(state.save_steps, 1) == 0 or step == state.max_steps
            if state.global_step < step <= state.max_steps and due:
                reject_to_replace(folder)

    @contextlib.contextmanager
    def output_held(self) -> Iterator[None]:
        """Keep other runs out of the output folder, also ranks that do not know of each other.

        Blocks may be nested: the outermost one holds the lock, so that what is saved and evaluated
        after `train` can be in the same block.

        Raises:
            OutputBusy: another run writes to the folder.
        """
        if (
            self._holds_output
            or not self.is_world_process_zero()
            or self.hp_search_backend is not None
        ):
            yield
            return
        folder = Path(self.args.output_dir)
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        remedy = "give each run an output_dir of its own; start the ranks of one run with torchrun"
        with exclusive(folder / ".sfttrain-lock", "another run", folder, remedy=remedy):
            self._holds_output = True
            try:
                yield
            finally:
                self._holds_output = False

    # ---- resuming ----

    def _checkpoint_to_resume(self, asked: str | bool | None) -> str | None:
        if asked is None or not is_resume_requested(asked):
            return None
        # All files of a checkpoint are read, which one process of each machine does.
        needs = Needs(
            ranks=self.args.world_size,
            stream=is_stream(self.train_dataset),
            adapter=unwrap_peft(self.model) is not self.model,
            optimizer=not self.args.save_only_model,
            tensors=self._expected_tensors(),
        )
        find = partial(find_checkpoint, asked, self.args.output_dir, needs=needs)
        folder = self._parts.preparation.once.do(find)
        if not needs.optimizer:
            logger.warning(
                "checkpoints with save_only_model have no optimizer and no schedule: both start "
                "from the beginning, with the weights of %s",
                folder,
            )
        return folder

    def _expected_tensors(self) -> ExpectedTensors | None:
        """What a model file of this run has; None where it is not known, as of sharded weights."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return None
        adapter = (
            str(getattr(self.model, "active_adapters", [""])[0]) if _is_adapted(self.model) else ""
        )
        if adapter:
            return ExpectedTensors(
                shapes=_shapes(adapter_tensors(self.model, adapter)), adapter=adapter
            )
        tensors = all_tensors(self.model)
        saved = _as_saved(self.model, tensors)
        return (
            None
            if saved is None
            else ExpectedTensors(shapes=_shapes(saved), optional=frozenset(_tied(self.model)))
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the weights, as Trainer does.

        Raises:
            MismatchError: they are not those of this model.
        """
        with _mismatches(resume_from_checkpoint, "weights"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            self._load_converted(resume_from_checkpoint, self.model if model is None else model)

    def _load_best_model(self) -> None:
        """Load the weights of the best checkpoint, as Trainer does.

        Raises:
            ConfigError: the checkpoint is not what was saved.
        """
        folder = Path(str(self.state.best_model_checkpoint))
        # All of its files are read, which one process of each machine does.
        fault = self._parts.preparation.once.do(partial(find_saved_fault, folder))
        if fault and folder.is_dir():
            raise ConfigError(
                f"the best checkpoint, {folder}, is not complete: {fault}; no final model is saved",
                remedy="to keep the last weights, resume with --resume_from_checkpoint latest, and"
                " without load_best_model_at_end",
            )
        super()._load_best_model()
        self._load_converted(str(self.state.best_model_checkpoint), self.model)

    def _load_converted(self, folder: str, model: Any) -> None:
        """Load weights whose names in the file are others than in the model, such as experts.

        Trainer takes the tensors by their names and would leave these as they were.
        """
        if _is_adapted(model) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return
        saved = _as_saved(model, all_tensors(model))
        if saved is None or saved.keys() == all_tensors(model).keys():
            return
        loaded = type(model).from_pretrained(folder, config=model.config, dtype=model.dtype)
        model.load_state_dict(loaded.state_dict())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _mismatches(checkpoint, "random states"):
            super()._load_rng_state(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with _mismatches(checkpoint, "scaler"):
            super()._load_scaler(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Restore optimizer and schedule, and log where settings of this run have no effect.

        Raises:
            MismatchError: the states are those of another optimizer.
        """
        if checkpoint is None or self.args.save_only_model:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        recorded = RunState.load(checkpoint).settings
        simple = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        path = Path(checkpoint) / "optimizer.pt"
        with _mismatches(checkpoint, "optimizer and schedule"):
            wanted = list_group_settings(self.optimizer) if simple else []
            if simple:
                # Only old checkpoints do not name their optimizer.
                known = "optimizer" in recorded or not path.is_file()
                saved = None if known else torch.load(path, weights_only=True, mmap=True)
                reject_other_optimizer(recorded, saved, self.args, self.optimizer, checkpoint)
            super()._load_optimizer_and_scheduler(checkpoint)
            if simple and self.is_world_process_zero():
                warn_of_changes(recorded, self.args, wanted, self.optimizer)

    # ---- checkpoints ----

    def run_state(self) -> RunState:
        """What a checkpoint of this run, now, says of it."""
        plan = self.step_plan()
        stream = self.train_dataset.identity if is_stream(self.train_dataset) else ""
        digest = str(getattr(getattr(self.train_dataset, "manifest", None), "digest", stream))
        return RunState(
            digest,
            plan.packs_per_step,
            plan.seed,
            self.trained_tokens,
            self.code,
            self.args.world_size,
        )

    def _state_to_save(self) -> RunState:
        """What the checkpoint that is being saved says of the run."""
        # Read before it is saved: a run that goes on from here has seen these tokens, logged or
        # not. What was read is kept for the next log.
        total = self.trained_tokens + self._counters.peek(self.accelerator).tokens
        counted = {
            "trainer": self.state.global_step,
            "optimizer": last_optimizer_step(getattr(self.optimizer, "state", {}).values()),
            "schedule": getattr(self.lr_scheduler, "last_epoch", None),
        }
        return dataclasses.replace(
            self.run_state(),
            trained_tokens=total,
            steps={name: step for name, step in counted.items() if isinstance(step, int)},
            settings=settings_to_record(self.args, self.optimizer),
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        optimizer = None if self.args.save_only_model else self.optimizer
        self._finite.check_saved(self.model, self.state.global_step, optimizer)
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        self._refuse_to_replace(folder)
        run_state = self._state_to_save()  # on all ranks: it sums what they have trained on
        with save_errors(folder), self._limit_hidden() as limit:
            if self.args.should_save:
                begin_folder(folder)
                run_state.save(folder)
                self._written.add(folder.name)
            self.accelerator.wait_for_everyone()
            if self._stream is not None:
                self._stream.save(str(folder), self.args.process_index, self.args.world_size)
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # each process has written files of its own
            if not self.args.should_save:
                return
            seal_checkpoint(folder)
            if limit is not None and limit > 0:
                best = self.state.best_model_checkpoint
                kept = {folder.name, *([Path(best).name] if best else [])}
                rotate_checkpoints(folder.parent, limit, kept=kept, written=self._written)

    def _refuse_to_replace(self, folder: Path) -> None:
        """Refuse, on all ranks together, to write a checkpoint over files of others."""
        if folder.name in self._written:
            return
        self._refuse_together(partial(reject_to_replace, folder), folder)

    def _finalize_training(self, *given: Any, **options: Any) -> Any:
        with self._limit_hidden() as limit:
            result = super()._finalize_training(*given, **options)
        best = self.state.best_model_checkpoint
        if self.args.should_save and limit == 1 and best is not None:
            rotate_checkpoints(Path(best).parent, 1, kept={Path(best).name}, written=self._written)
        return result

    @contextlib.contextmanager
    def _limit_hidden(self) -> Iterator[int | None]:
        """Hide save_total_limit from Trainer, which would delete folders of others; gives it."""
        self._limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield self._limit
        finally:
            self.args.save_total_limit, self._limit = self._limit, None

    # ---- the final model ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model or adapter, as Trainer does.

        Raises:
            TrainingDiverged: a tensor of it is not finite; nothing is written then.
            OutputExists: the output folder has such files of the user's.
        """
        if _internal_call:  # of a checkpoint or a push, which have been checked
            super().save_model(output_dir, _internal_call=True)
            return
        self._finite.check_saved(self.model, self.state.global_step)
        folder = Path(output_dir or str(self.args.output_dir))
        at_top = folder.resolve() == Path(str(self.args.output_dir)).resolve()
        if at_top and not self._output_checked:
            self._refuse_output()
        with save_errors(folder):
            if at_top and self.args.should_save:
                begin_output(folder)
            super().save_model(output_dir)
            if at_top:
                self._seal_output()

    def save_state(self) -> None:
        """Save Trainer's state in the output folder, as Trainer does."""
        if not self._output_checked:
            self._refuse_output()
        super().save_state()
        self._seal_output()

    def create_model_card(self, *given: Any, **options: Any) -> None:
        """Write README.md in the output folder, as Trainer does."""
        super().create_model_card(*given, **options)
        self._seal_output()

    def push_to_hub(self, *given: Any, **options: Any) -> Any:
        """Save the model or adapter and upload it, as Trainer does.

        Raises:
            TrainingDiverged: a tensor of it is not finite; nothing is written or uploaded then.
            OutputExists: the output folder has such files of the user's.
        """
        self._finite.check_saved(self.model, self.state.global_step)
        if not self._output_checked:
            self._refuse_output()
        return super().push_to_hub(*given, **options)

    def _refuse_output(self) -> None:
        """Refuse, on all ranks together, to save the final model over files of others."""
        folder = Path(str(self.args.output_dir))
        adapters = list(getattr(self.model, "peft_config", {})) if _is_adapted(self.model) else []
        self._refuse_together(partial(reject_foreign_output, folder, adapters), folder)
        self._output_checked = True

    def _seal_output(self) -> None:
        """List the files of the final model, so that the next run knows them as ours."""
        if self.args.should_save:
            seal_output(Path(str(self.args.output_dir)))

    def _refuse_together(self, check: Callable[[], None], folder: Path) -> None:
        """Raise, on all ranks, the error of a check by those that save."""
        fault: OutputExists | None = None
        if self.args.should_save:
            try:
                check()
            except OutputExists as error:
                fault = error
        bad = torch.tensor(float(fault is not None), device=self.accelerator.device)
        if self.accelerator.reduce(bad, reduction="sum").item():
            raise fault or OutputExists(f"another process cannot write {folder}")

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        # Trainer pickles its arguments beside the model, the access token for the Hub among them.
        token, self.args.hub_token = self.args.hub_token, None
        limit, self.args.save_total_limit = (
            self.args.save_total_limit,
            self._limit or self.args.save_total_limit,
        )
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token, self.args.save_total_limit = token, limit


def _is_adapted(model: Any) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _tied(model: nn.Module) -> set[str]:
    """Names of tensors that have another name too: a file has only one of them."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for same in names.values() if len(same) > 1 for name in same}


def _as_saved(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The tensors as transformers writes them, which names and divides some (experts) differently;
    without their values. None where that is not known."""
    without_values = {name: tensor.to("meta") for name, tensor in tensors.items()}
    try:
        from transformers.core_model_loading import revert_weight_conversion

        saved: dict[str, Tensor] = revert_weight_conversion(model, without_values)
    except Exception:  # it is not a documented function; the check is left out then
        return None
    return saved


@contextlib.contextmanager
def _mismatches(checkpoint: str | None, what: str) -> Iterator[None]:
    """Turn what torch, peft and transformers raise on files of another run into MismatchError."""
    try:
        yield
    except (
        KeyError,
        ValueError,
        RuntimeError,
        TypeError,
        AttributeError,
        IndexError,
        pickle.UnpicklingError,
    ) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        detail = " ".join(str(error).split())[:300]
        verb = "does" if what == "scaler" else "do"
        raise MismatchError(
            f"the {what} of {checkpoint} {verb} not fit this run: {type(error).__name__}: {detail}",
            remedy="resume with the model and the settings of the checkpoint, or from another one",
        ) from error
