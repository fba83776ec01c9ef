"""Trainer's pushes to the Hub, with errors that name the Hub and not the disk.

The Hub's library raises OSErrors, like a full disk. A push of a checkpoint runs in the background,
where Trainer ignores its errors.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer

from sftprep.stores import hub_errors, hub_reason

logger = logging.getLogger(__name__)


class _UnsavedToken(str):
    """An access token that is None when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ())


class PushingTrainer(Trainer):  # type: ignore[misc]
    """The pushing part of SFTTrainer."""

    # The value of save_total_limit while it is hidden from Trainer.
    _hidden_limit: int | None = None

    @contextmanager
    def arguments_to_pickle(self) -> Iterator[None]:
        """Change the arguments, which Trainer pickles into training_args.bin, while a block runs.

        The access token for the Hub must not be shared with the model. The pickle of a function is
        code, so the file has only its name. While the limit of checkpoints is hidden, the file must
        have the one that the user specified.
        """
        token, transform = self.args.hub_token, self.args.transform
        limit = self.args.save_total_limit
        self.args.hub_token = None if token is None else _UnsavedToken(token)
        self.args.transform = None if transform is None else str.__str__(transform)
        self.args.save_total_limit = self._hidden_limit or limit
        try:
            yield
        finally:
            self.args.hub_token, self.args.transform = token, transform
            self.args.save_total_limit = limit

    def init_hf_repo(self, *arguments: Any, **options: Any) -> None:
        """Create the repository of the model, as Trainer does.

        Raises:
            HubError: The Hub cannot be reached, or refuses.
        """
        with self._hub_errors("create"):
            super().init_hf_repo(*arguments, **options)

    def push_to_hub(self, *arguments: Any, **options: Any) -> Any:
        """Save the model or adapter and upload it, as Trainer does.

        Raises:
            HubError: The Hub cannot be reached, or refuses. The model is in the output folder.
        """
        with self._hub_errors("push the model to"):
            return super().push_to_hub(*arguments, **options)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        with self._hub_errors("push a checkpoint to"), self.arguments_to_pickle():
            super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        """Wait for the pushes of checkpoints, and log those that failed: training has ended."""
        current = getattr(self, "push_in_progress", None)
        super()._finish_current_push()
        for job in getattr(current, "jobs", ()):
            if job.done() and (error := job.exception()) is not None:
                logger.warning(
                    "a checkpoint was not pushed to %s on the Hub: %s",
                    self._repository_name(),
                    hub_reason(error),
                )

    def _hub_errors(self, action: str) -> AbstractContextManager[None]:
        where = f"{self._repository_name()} (the files are in {self.args.output_dir})"
        return hub_errors(action, where)

    def _repository_name(self) -> str:
        default = Path(str(self.args.output_dir)).absolute().name
        return str(self.hub_model_id or self.args.hub_model_id or default)
