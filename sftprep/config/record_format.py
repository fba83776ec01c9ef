"""The settings of the reading of a record, and of its trained tokens."""

from __future__ import annotations

from dataclasses import dataclass

from sftprep.config.user_functions import to_function_setting
from sftprep.config.validation import (
    FormatName,
    Images,
    Reasoning,
    TrainEnd,
    TrainOn,
    TrainRole,
    YesNo,
    check_choice,
    check_message,
    check_type,
    split_list,
    template_variables,
    to_strings,
)
from sftprep.errors import ConfigError, setting


@dataclass(frozen=True, slots=True)
class FormatConfig:
    """The reading of a record, and its trained tokens."""

    format: FormatName = "auto"
    """Format of the records; auto: detected from the keys of the first records of each input."""
    text_field: str = "text"
    """Key of the text, for the text format."""
    map: tuple[str, ...] = ()
    """Keys to rename before a record is read: question=prompt,answer=completion."""
    train_on: TrainOn = "auto"
    """Tokens that are trained. all: every token; completion: the completion; assistant: the
    assistant turns; last-assistant: the last assistant turn; auto: the completion where there is
    one, else every token."""
    train_roles: tuple[TrainRole, ...] = ()
    """Roles of the turns that are trained, instead of those of the assistant: user,assistant. The
    text of a turn and the token that ends it are trained, not its header."""
    train_end: TrainEnd = "turn"
    """Tokens that end the trained turns. turn: all of them are trained; last: only that of the last
    trained turn of a conversation; none: none of them."""
    system: str | None = None
    """System message of the conversations that have none. A record with one, also under a key such
    as system, keeps it."""
    chat_template_kwargs: str | None = None
    """Variables of the chat template for all conversations, as a JSON object:
    {"enable_thinking": false}. Those of a record, under the same key, take precedence."""
    reasoning: Reasoning = "template"
    """Reasoning of earlier turns, which many templates remove. template: what the template writes;
    keep: insert what the template writes for a turn that is the last one; expand: one example for
    each assistant turn, as the model sees the conversation when it writes that turn; drop: remove
    all reasoning before rendering."""
    expand_turns: bool = False
    """The same as --reasoning expand."""
    train_empty_thinking: YesNo = "yes"
    """no: blocks of reasoning without reasoning, which some templates write, are not trained."""
    escape_special: bool = False
    """Encode special tokens that a record spells out in its texts, such as <|im_end|>, as plain
    text."""
    as_chat: bool | None = None
    """Read a prompt and its completion as turns of a user and of the assistant, also if both are
    strings. Default: only known pairs of keys (question and answer, instruction and response, ...),
    if there is a chat template; --no-as-chat: not even those."""
    images: Images = "error"
    """error: a record with images is a bad record; drop: its images and their placeholders are
    removed, and it is counted."""
    formatting_func: str | None = None
    """Function that returns the text of a record: package.module:function, or file.py:function."""
    transform: str | None = None
    """Function that returns another record for a record, a list of records, or sftprep.Drop(reason)
    for none, before --map and the detection of the format: file.py:function, or
    package.module:function."""
    transform_id: str | None = None
    """Name of the present version of a function without a stable digest, such as a lambda. Without
    it, nothing that is made with the function is reused."""

    def __post_init__(self) -> None:
        for name in ("formatting_func", "transform"):
            function = to_function_setting(getattr(self, name), setting(name))
            object.__setattr__(self, name, function)
        check_type(self.transform_id, setting("transform_id"), str, "a string")
        check_message(self.system, setting("system"))
        variables = template_variables(self.chat_template_kwargs, setting("chat_template_kwargs"))
        object.__setattr__(self, "chat_template_kwargs", None if variables == "{}" else variables)
        if self.formatting_func is not None and self.format not in ("auto", "text"):
            raise ConfigError(
                f"{setting('formatting_func')} returns plain text, which is not compatible with"
                f" {setting('format', self.format)}",
                remedy="leave out one of the two",
            )
        check_choice(setting("reasoning"), self.reasoning, Reasoning)
        check_choice(setting("train_empty_thinking"), self.train_empty_thinking, YesNo)
        if self.expand_turns:
            if self.reasoning not in ("template", "expand"):
                raise ConfigError(
                    f"{setting('expand_turns')} is {setting('reasoning', 'expand')}, but"
                    f" {setting('reasoning', self.reasoning)} is given too",
                    remedy="leave out one of the two",
                )
            object.__setattr__(self, "reasoning", "expand")
        object.__setattr__(self, "expand_turns", self.reasoning == "expand")
        if self.expand_turns and self.train_on == "all":
            raise ConfigError(
                f"{setting('reasoning', 'expand')} with {setting('train_on', 'all')} would train"
                " the early turns of a conversation again in each of its examples",
                remedy=[
                    f"leave out {setting('train_on')}",
                    f"use {setting('train_on', 'assistant')}",
                ],
            )
        check_choice(setting("format"), self.format, FormatName)
        check_choice(setting("train_on"), self.train_on, TrainOn)
        check_choice(setting("images"), self.images, Images)
        self._check_turns()
        pairs = split_list((self.map,) if isinstance(self.map, str) else self.map)
        for pair in pairs:
            source, equals, target = pair.partition("=")
            if not (equals and source and target):
                raise ConfigError(
                    f"{setting('map')} is {pair!r}, not of the form key=name",
                    remedy=f"write {setting('map', 'question=prompt,answer=completion')}",
                )
        object.__setattr__(self, "map", pairs)

    def _check_turns(self) -> None:
        object.__setattr__(self, "train_roles", split_list(to_strings(self.train_roles)))
        for role in self.train_roles:
            check_choice(setting("train_roles"), role, TrainRole)
        check_choice(setting("train_end"), self.train_end, TrainEnd)
        if self.train_roles:
            self._check_trains_turns("train_roles", ("auto", "assistant"))
            object.__setattr__(self, "train_on", "assistant")
        if self.train_end != "turn":
            self._check_trains_turns("train_end", ("assistant", "last-assistant"))

    def _check_trains_turns(self, name: str, compatible: tuple[TrainOn, ...]) -> None:
        """Check that a setting that concerns trained turns has an effect."""
        if self.expand_turns:
            raise ConfigError(
                f"{setting(name)} is not supported with {setting('reasoning', 'expand')}",
                remedy="leave out one of the two",
            )
        if self.train_on not in compatible:
            raise ConfigError(
                f"{setting(name)} needs trained turns",
                remedy=f"set {setting('train_on', 'assistant')}",
            )

    def renames(self) -> dict[str, str]:
        """Return the new name of each key to rename."""
        return dict(pair.split("=", 1) for pair in self.map)
