"""Settings of the reading of raw records, with the meaning that they have in `sftprep build`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from sftprep.config import FormatConfig, to_function_setting
from sftprep.errors import ConfigError, setting
from sfttrain.config.setting_names import TrainerNames

_TrainOn = Literal["auto", "all", "completion", "assistant"]

_TRAIN_ON: dict[bool | None, _TrainOn] = {None: "auto", True: "completion", False: "all"}
"""The trained tokens of a build, by completion_only_loss."""


@dataclass
class RecordSettings:
    """The settings of sfttrain that concern raw records, as fields of `SFTConfig`."""

    if TYPE_CHECKING:  # TRL's settings
        assistant_only_loss: bool
        completion_only_loss: bool | None

    reasoning: Literal["template", "keep", "expand", "drop"] | None = field(
        default=None,
        metadata={
            "help": "Reasoning of earlier turns in raw records. template: what the template writes;"
            " keep: insert what the template writes for a turn that is the last one; expand: one"
            " example for each assistant turn; drop: remove all reasoning. By default, what TRL"
            " does: keep with assistant_only_loss and a template of Qwen3, Qwen3.5 or Qwen3.6."
        },
    )
    transform: str | None = field(
        default=None,
        metadata={
            "help": (
                "Function that returns another record for a raw record, a list of records, or"
                " sftprep.Drop(reason): file.py:function; in Python also the function itself."
            )
        },
    )
    transform_id: str | None = field(
        default=None,
        metadata={
            "help": (
                "Name of the present version of a transform without a source file, so that"
                " prepared data is reused and a stream can be resumed."
            )
        },
    )
    on_bad_record: Literal["error", "quarantine"] = field(
        default="error",
        metadata={
            "help": "What to do with a raw record that cannot be used: error, or quarantine."
        },
    )
    images: Literal["error", "drop"] = field(
        default="error",
        metadata={"help": "What to do with a raw record that has images: error, or drop them."},
    )
    format: str = field(
        default="auto",
        metadata={
            "help": "Format of raw records, as for sftprep build: auto, messages, text (which reads"
            " .txt files as well) ..."
        },
    )
    map: str | None = field(
        default=None,
        metadata={"help": "Keys of raw records to rename: Query=instruction,Reply=output."},
    )
    escape_special: bool = field(
        default=False,
        metadata={"help": "Encode special tokens that a raw record spells as plain text."},
    )
    strip_nulls: bool = field(
        default=False,
        metadata={
            "help": "Leave out keys with null in raw records, which the columns of a table add."
        },
    )
    as_chat: bool | None = field(
        default=None,
        metadata={
            "help": "Read a prompt and a completion that are strings as turns; by default only"
            " known pairs of other keys, such as question and answer."
        },
    )
    train_roles: list[str] | None = field(
        default=None,
        metadata={
            "help": "Roles of the turns of raw records that are trained, instead of those of the"
            " assistant: assistant, user, system, tool."
        },
    )
    train_end: Literal["turn", "last", "none"] = field(
        default="turn",
        metadata={
            "help": "Tokens that end the trained turns of raw records. turn: all are trained; last:"
            " only that of the last trained turn; none: none of them."
        },
    )
    system: str | None = field(
        default=None,
        metadata={"help": "System message of the raw conversations that have none."},
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Variables of the chat template for all raw conversations; those of a record"
            " take precedence."
        },
    )

    def check_records(self) -> None:
        """Check the settings, and bring them into one form.

        Raises:
            ConfigError: A setting is invalid.
        """
        self.transform = to_function_setting(self.transform, setting("transform"))
        settings = {
            name: getattr(self, name)
            for name in ("train_on", "train_roles", "train_end", "system", "chat_template_kwargs")
            if getattr(self, name) is not None
        }
        try:
            checked = FormatConfig(**settings)
        except ConfigError as error:
            raise error.shown_by(TrainerNames("train_dataset", None)) from error
        self.train_roles = list(checked.train_roles) or None
        variables = checked.chat_template_kwargs
        self.chat_template_kwargs = None if variables is None else json.loads(variables)

    @property
    def train_on(self) -> _TrainOn:
        """The trained tokens, as for a build."""
        if self.assistant_only_loss or self.train_roles:
            return "assistant"
        return _TRAIN_ON[self.completion_only_loss]
