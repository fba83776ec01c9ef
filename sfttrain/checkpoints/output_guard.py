"""Exclusive use of an output folder, and the check for files of others.

All ranks raise an error of these checks together: a rank that continued alone would wait for the
others in the next collective operation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from sftprep.errors import OutputExists, setting
from sftprep.shards import exclusive, storage_errors
from sfttrain.checkpoints.loading import has_adapter
from sfttrain.checkpoints.output_folders import reject_unowned_output
from sfttrain.checkpoints.own_files import break_links, seal_output


class OutputGuard:
    """The guard of a trainer's output folder.

    Args:
        trainer: The Trainer. Its arguments, model and accelerator are read at each call, because
            Trainer can replace them.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        # Whether this process holds the lock; the blocks of `lock` can be nested.
        self._is_locked = False
        # Whether `check` has found that the final model can be saved to the top of the folder.
        self._is_checked = False

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(str(self._trainer.args.output_dir))

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other runs out of the folder while the block runs.

        Raises:
            OutputBusy: Another run writes to the folder.
        """
        if self._is_locked:
            yield
            return
        with storage_errors(self.folder, folder_setting="output_dir"):
            self.folder.mkdir(parents=True, exist_ok=True)
        remedy = (
            f"use a different {setting('output_dir')} for each run; start the ranks of one run with"
            " torchrun"
        )
        lock_file = self.folder / ".sfttrain-lock"
        with exclusive(lock_file, "another run", self.folder, remedy=remedy):
            self._is_locked = True
            try:
                yield
            finally:
                self._is_locked = False

    def check(self) -> None:
        """Refuse, on all ranks, to save the final model over files of others.

        Raises:
            OutputExists: The folder has files of a model that sfttrain did not write.
        """
        adapters, folder = self._adapters(), self.folder
        self.reject_together(lambda: reject_unowned_output(folder, adapters), folder)
        self._is_checked = True

    def prepare_save(self) -> None:
        """Check the folder, unless it was done before, and detach its files from backups.

        Raises:
            OutputExists: The folder has files of a model that sfttrain did not write.
        """
        if not self._is_checked:
            self.check()
        if self._trainer.args.should_save:
            with storage_errors(self.folder, folder_setting="output_dir"):
                for name in ("", *self._adapters()):
                    if name != "default":  # peft saves this adapter to the output folder itself
                        break_links(self.folder / name)

    def _adapters(self) -> list[str]:
        model = self._trainer.model
        return list(model.peft_config) if has_adapter(model) else []

    def seal(self) -> None:
        """Record the files of the final model as ours, for the next run."""
        if self._trainer.args.should_save:
            seal_output(self.folder)

    def reject_together(self, check: Callable[[], None], folder: Path) -> None:
        """Run a check on the saving ranks, and raise its error on all ranks.

        Args:
            check: Raises OutputExists.
            folder: The checked folder, for the message on the other ranks.

        Raises:
            OutputExists: The check failed on any rank.
        """
        fault: OutputExists | None = None
        if self._trainer.args.should_save:
            try:
                check()
            except OutputExists as error:
                fault = error
        accelerator = self._trainer.accelerator
        has_failed = torch.tensor(float(fault is not None), device=accelerator.device)
        if accelerator.reduce(has_failed, reduction="sum").item():
            raise fault or OutputExists(f"another process cannot write {folder}")
