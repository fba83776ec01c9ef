"""Warnings about the data of a build: what was found, how often, and where first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from sftprep.core.omissions import (
    COLUMN_NOT_READ,
    KEY,
    LAST_REASONING,
    MESSAGE,
    NO_COMPARED_KEY,
    NO_REASONING,
    NO_TEXT_WITH_CALL,
    OMISSION_KINDS,
    REASONING,
    REASONING_LEFT,
    SYSTEM_ADDED,
    TEXT_WITH_CALL,
    VARIABLE_NOT_READ,
)
from sftprep.errors import (
    PythonNames,
    SettingNames,
    format_count,
    front_end,
    has_settings,
    render_settings,
    setting,
    source_name,
)
from sftprep.shards.manifest import Manifest


class _Kind(NamedTuple):
    """A kind of warning."""

    counted: str  # what is counted: records, sequences or partitions
    text: str  # what is wrong
    remedy: str = ""  # what the user can do about it, with references to settings


KINDS: dict[str, _Kind] = {
    **{
        kind: _Kind("record", f"the chat template drops {what}, which is missing from the tokens")
        for kind, what in OMISSION_KINDS.items()
    },
    KEY: _Kind(
        "record",
        "a turn has text under a key that is not read, and which the chat template does not show",
    ),
    REASONING: _Kind(
        "record",
        f"the chat template drops {OMISSION_KINDS[REASONING]}, which is missing from the tokens",
        f"{setting('reasoning', 'keep')} keeps that of earlier turns",
    ),
    NO_REASONING: _Kind(
        "record",
        "the template shows no reasoning in any turn",
        f"specify a template that shows reasoning with {setting('chat_template', 'FILE')}, or"
        " accept that it is not trained",
    ),
    TEXT_WITH_CALL: _Kind(
        "record",
        f"the chat template drops {OMISSION_KINDS[TEXT_WITH_CALL]}, which is missing from the"
        " tokens",
        f"{setting('reasoning', 'keep')} keeps that of earlier turns",
    ),
    NO_TEXT_WITH_CALL: _Kind(
        "record",
        "the template does not show such text in the last turn either",
        f"specify a template that shows it with {setting('chat_template', 'FILE')}, or accept that"
        " it is not trained",
    ),
    LAST_REASONING: _Kind(
        "record",
        "this includes reasoning of the last turn",
        f"use one key for the reasoning of a turn, or another {setting('chat_template')}",
    ),
    "keep_unproven": _Kind(
        "record",
        "it is not certain what to insert for the reasoning of an earlier turn, which is missing"
        " from the tokens",
        f"train each turn with its reasoning with {setting('reasoning', 'expand')}",
    ),
    "switch_not_read": _Kind(
        "record",
        "a turn has a key that appears to select what is trained, and which is not read",
        f"express it as train, weight or loss_mask with {setting('transform', 'FILE.py:NAME')}",
    ),
    VARIABLE_NOT_READ: _Kind(
        "record",
        "the chat template does not read a variable in chat_template_kwargs",
        "remove the variable, or specify a template that reads it with"
        f" {setting('chat_template', 'FILE')}",
    ),
    SYSTEM_ADDED: _Kind(
        "record", f"it has no system message, so that of {setting('system')} is added"
    ),
    "images_dropped": _Kind("record", "the images were removed, and the text was kept"),
    "reasoning_removed": _Kind("record", "all reasoning was removed, as the settings specify"),
    REASONING_LEFT: _Kind(
        "record",
        "tags of reasoning remain: they are in a text without turns, or the answer appears to"
        " mention them",
        f"remove it with {setting('transform', 'FILE.py:NAME')}",
    ),
    "prompt_not_prefix": _Kind(
        "sequence",
        "the tokens of the prompt alone are not a prefix of those of prompt and completion;"
        " training starts at the first token that differs",
    ),
    "end_of_turn_not_trained": _Kind(
        "sequence",
        "the trained part does not end with a token that ends a turn; the model may not learn to"
        " stop",
    ),
    "double_bos": _Kind(
        "sequence",
        "the sequence starts with two beginning-of-sequence tokens",
        "remove the one in the text or in the template",
    ),
    "unknown_tool": _Kind(
        "record", 'the assistant calls a tool that is not among the "tools" of the record'
    ),
    "no_target": _Kind("record", "no message is from the assistant, so there is nothing to learn"),
    "role_order": _Kind("record", "the roles of the messages are in an unusual order"),
    "bad_tool": _Kind(
        "record",
        "a message has the result of a tool, but the message before it is not from the assistant"
        " or a tool",
    ),
    "empty_turn": _Kind("record", "a message of the user is empty"),
    "empty_target": _Kind("record", "a message of the assistant, or the completion, is empty"),
    "suspects_rejected": _Kind(
        "record",
        "the conversation is readable but looks wrong, so it was rejected as a bad record",
        f"train on such records with {setting('quality_checks', 'keep')}",
    ),
    "unknown_characters": _Kind(
        "sequence",
        "the text contains characters that the tokenizer does not know, which are lost",
    ),
    "special_token_in_content": _Kind(
        "record",
        "the text contains strings that are special tokens and is encoded with them",
        f"encode them as plain text with {setting('escape_special', True)}",
    ),
    "encoder_failed_over": _Kind(
        "partition",
        "the fast encoder gave other ids than the library tokenizers, which encoded these"
        " partitions instead",
    ),
    "mask_failed_over": _Kind(
        "partition",
        "a loss mask computed from token ids differed from the one computed from characters, which"
        " was used for these partitions instead",
    ),
}
"""The kinds of warnings, by their name in the ledger, in the order in which they are shown."""


_UNTRAINED_MESSAGE = (
    f"the chat template drops {OMISSION_KINDS[MESSAGE]}, or no turn after it is trained with"
    f" {setting('reasoning', 'expand')}, so it is missing from the tokens"
)
"""The text of the warning about messages with one sequence for each turn."""


@dataclass(frozen=True, slots=True)
class DataWarning:
    """A warning about the records of a build.

    Attributes:
        kind: Its name in the ledger.
        number: The number of records (or sequences, or partitions) that it concerns; 0: not known.
        file: The file, or name of the source, of the first of them; "" if it is not known.
        line: The line of the first of them, from 1.
        remedy: What the user can do about it; None for that of the kind.
        is_expanded: Whether a message may also be missing because no turn after it is trained.
    """

    kind: str
    number: int = 0
    file: str = ""
    line: int = 0
    remedy: str | None = None
    is_expanded: bool = False

    @property
    def text(self) -> str:
        """What is wrong, with references to settings."""
        return _UNTRAINED_MESSAGE if self.is_expanded else _kind_of(self.kind).text

    @property
    def severity(self) -> Literal["note", "warning"]:
        """Whether it only says what the settings request."""
        return "note" if self.kind == SYSTEM_ADDED else "warning"

    @property
    def counted(self) -> str:
        """What `number` counts: records, sequences or partitions, in the singular."""
        return _kind_of(self.kind).counted

    def remedy_for(self, names: SettingNames) -> str:
        """Return the remedy, with references to settings; "" if there is none.

        Args:
            names: The form of settings; a remedy with settings that the front end lacks is none.
        """
        remedy = _kind_of(self.kind).remedy if self.remedy is None else self.remedy
        return remedy if has_settings(remedy, names) else ""

    def render(self, names: SettingNames | None = None) -> str:
        """Return the warning as text.

        Args:
            names: The form of settings; by default that of the front end.
        """
        facts = []
        if self.number:
            facts.append(format_count(self.number, self.counted))
        if self.file:
            facts.append(f"first in {source_name(self.file)}:{self.line}")
        text = self.text + (f" ({', '.join(facts)})" if facts else "")
        names = names or front_end.get(PythonNames())
        remedy = self.remedy_for(names)
        return render_settings(f"{text}; {remedy}" if remedy else text, names)


def _kind_of(name: str) -> _Kind:
    if name.startswith(COLUMN_NOT_READ):
        column = name.removeprefix(COLUMN_NOT_READ)
        return _Kind(
            "record",
            f"the column {column!r} is not read, although its name suggests content or a switch"
            " of training",
            "if it belongs to the text, or selects turns, apply it with"
            f" {setting('transform', 'FILE.py:NAME')}",
        )
    if name.startswith(NO_COMPARED_KEY):
        key = name.removeprefix(NO_COMPARED_KEY)
        return _Kind(
            "record",
            f"the record has no {key!r}, by which records are compared; one without all keys of"
            f" {setting('duplicates_by')} is compared by what its format reads",
        )
    return KINDS.get(name, _Kind("record", name.replace("_", " ")))


def data_warnings(manifest: Manifest) -> list[DataWarning]:
    """Return the warnings about the data of a build."""
    return describe_warnings(manifest.accounting.warnings, manifest.config, manifest.locate_warning)


def describe_warnings(
    found: Mapping[str, int],
    settings: Mapping[str, Any],
    locate: Callable[[str], tuple[str, int] | None],
) -> list[DataWarning]:
    """Return the warnings for counts of records, in the order in which they are shown.

    Args:
        found: The number of records of each kind.
        settings: The settings by which the records were read.
        locate: Returns the file and 1-based line of the first record of a kind; None if it is not
            known.
    """
    known = [kind for kind in KINDS if kind in found]
    others = [kind for kind in found if kind not in KINDS]
    num_reasoning = found.get(REASONING)
    # `keep` helps only with the reasoning of earlier turns, instead of another mode; what it could
    # not keep has a warning of its own.
    needs_other_remedy: set[str] = set()
    has_mode = settings.get("reasoning", "template") != "template"
    if has_mode or num_reasoning in (found.get(LAST_REASONING), found.get(NO_REASONING)):
        needs_other_remedy.add(REASONING)
    if has_mode or found.get(TEXT_WITH_CALL) == found.get(NO_TEXT_WITH_CALL):
        needs_other_remedy.add(TEXT_WITH_CALL)
    if settings.get("escape_special"):
        needs_other_remedy.add("special_token_in_content")
    if num_reasoning == found.get(NO_REASONING):
        needs_other_remedy.add(LAST_REASONING)
    expands = settings.get("reasoning") == "expand" or settings.get("expand_turns")
    return [
        DataWarning(
            kind,
            found[kind],
            *(locate(kind) or ("", 0)),
            remedy="" if kind in needs_other_remedy else None,
            is_expanded=bool(expands) and kind == MESSAGE,
        )
        for kind in (*known, *others)
    ]
