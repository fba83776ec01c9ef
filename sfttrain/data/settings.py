"""Settings of the preparation: the fields of an SFTConfig in a build's form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sftprep.errors import ConfigError, setting
from sfttrain.data.training_templates import keeps_reasoning

NO_CUT = 2**31 - 1
"""A max_length that truncates nothing."""


@dataclass(frozen=True)
class DataSettings:
    """How raw records become packs."""

    text_field: str
    """Key of the text in a record."""
    train_on: str
    """The trained tokens: auto, all, assistant or completion."""
    max_length: int
    """Largest length of a sequence and of a pack in tokens."""
    strategy: str
    """How records are packed, if they are: bfd, bfd_split or wrapped."""
    truncate_side: str
    """The end from which longer sequences are truncated: right or left."""
    shuffle: bool
    """Whether records are shuffled before they are packed."""
    seed: int
    """Seed of the shuffle."""
    workers: int | None
    """Worker processes of a build; None for a number that depends on the size of the input."""
    reasoning: str
    """Reasoning of earlier turns: template, keep, expand or drop."""
    on_bad_record: str
    """error or quarantine."""
    images: str
    """error or drop."""
    format: str
    """Format of the records; auto: it is detected."""
    map: str | None
    """Keys to rename, such as Query=instruction,Reply=output."""
    escape_special: bool
    """Whether special tokens in texts are encoded as plain text."""
    strip_nulls: bool
    """Whether keys with null are left out of records."""
    as_chat: bool | None
    """Whether prompts and completions that are strings are turns; None: only known pairs are."""
    skip_prepare: bool
    """Whether rows are used as they are (skip_prepare_dataset)."""
    use_completion_mask: bool
    """Whether the completion_mask of tokenized rows is applied."""
    train_prompt_assistants: bool
    """Whether assistant turns in prompts are trained too: assistant_only_loss with
    completion_only_loss=False."""
    train_roles: list[str] | None = None
    """Roles of the turns that are trained; None for those of the assistant."""
    train_end: str = "turn"
    """The trained tokens that end turns: turn, last or none."""
    system: str | None = None
    """System message of conversations without one."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the chat template for all conversations."""
    transform: str | None = None
    """The user's function that makes other records of records."""
    transform_id: str | None = None
    """The name of the present version of the function."""
    requested_length: int | None = None
    """The max_length that the user set; None if it is the default or no limit."""

    @classmethod
    def from_config(cls, args: Any, tokenizer: Any | None) -> DataSettings:
        """Return the settings of an SFTConfig.

        Args:
            args: The SFTConfig.
            tokenizer: The tokenizer of the run, whose own limit applies if the user set no
                max_length; None without a tokenizer.

        Raises:
            ConfigError: If dataset_kwargs has an unknown key.
        """
        from sfttrain.config.sft_config import DefaultLength

        length = NO_CUT if args.max_length is None else int(args.max_length)
        if isinstance(args.max_length, DefaultLength) and tokenizer is not None:
            length = min(length, int(tokenizer.model_max_length or length))
        options = args.dataset_kwargs or {}
        unknown = sorted(set(options) - {"skip_prepare_dataset"})
        if unknown:
            raise ConfigError(
                f"{setting('dataset_kwargs')} has {', '.join(unknown)}, but only"
                " skip_prepare_dataset is supported",
                remedy="remove the other keys",
            )
        return cls(
            text_field=args.dataset_text_field,
            train_on=args.train_on,
            max_length=length,
            strategy=args.packing_strategy,
            truncate_side={"keep_start": "right", "keep_end": "left"}[args.truncation_mode],
            shuffle=args.shuffle_dataset,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            workers=args.dataset_num_proc,
            reasoning=args.reasoning or _reasoning_of_trl(args, tokenizer),
            on_bad_record=args.on_bad_record,
            images=args.images,
            format=args.format,
            map=args.map,
            escape_special=args.escape_special,
            strip_nulls=args.strip_nulls,
            as_chat=args.as_chat,
            skip_prepare=bool(options.get("skip_prepare_dataset")),
            use_completion_mask=args.completion_only_loss is not False,
            train_prompt_assistants=(
                args.assistant_only_loss and args.completion_only_loss is False
            ),
            train_roles=args.train_roles,
            train_end=args.train_end,
            system=args.system,
            chat_template_kwargs=args.chat_template_kwargs,
            transform=args.transform,
            transform_id=args.transform_id,
            requested_length=args.requested_length,
        )

    def build_settings(self, packing: bool) -> dict[str, Any]:
        """Return the settings of a build, without its inputs, output and tokenizer."""
        # Best-fit packing emits the longest packs first, so the order of the records is kept only
        # where it survives: without packing, or where records are joined in their order.
        keep_order = not self.shuffle and (not packing or self.strategy == "wrapped")
        optional = {
            "transform": self.transform,
            "transform_id": self.transform_id,
            "map": self.map,
            "train_roles": self.train_roles,
            "system": self.system,
            "chat_template_kwargs": self.chat_template_kwargs,
        }
        return {
            **{name: value for name, value in optional.items() if value is not None},
            "text_field": self.text_field,
            "train_on": self.train_on,
            "max_length": self.max_length,
            "packing": self.strategy if packing else "none",
            "truncate_side": self.truncate_side,
            "order": "keep" if keep_order else "shuffle",
            "seed": self.seed % 2**64,
            "reasoning": self.reasoning,
            "on_bad_record": self.on_bad_record,
            "images": self.images,
            "format": self.format,
            "escape_special": self.escape_special,
            "strip_nulls": self.strip_nulls,
            "as_chat": self.as_chat,
            "train_end": self.train_end,
            # As in TRL, a record without an answer is trained; `auto` keeps suspects otherwise.
            **({"quality_checks": "keep"} if self.on_bad_record == "error" else {}),
        }


def _reasoning_of_trl(args: Any, tokenizer: Any | None) -> str:
    """Return how TRL treats the reasoning of earlier turns."""
    template = getattr(tokenizer, "chat_template", None)
    return "keep" if args.train_on == "assistant" and keeps_reasoning(template) else "template"
