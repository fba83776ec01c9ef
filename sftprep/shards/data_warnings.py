"""Warnings about the data of a build: what was found, how often, and where first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from sftprep.core.losses import LOSSES
from sftprep.errors import PythonNames, SettingNames, render_settings, setting, source_name
from sftprep.shards.manifest import Manifest


class _Kind(NamedTuple):
    """A kind of warning."""

    counted: str  # what is counted: records, sequences or partitions
    text: str  # what is wrong
    remedy: str = ""  # what the user can do about it, with references to settings


KINDS: dict[str, _Kind] = {
    **{
        kind: _Kind("record", f"the chat template drops {what}, which is missing from the tokens")
        for kind, what in LOSSES.items()
    },
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
    "empty_target": _Kind("record", "the completion is empty"),
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


@dataclass(frozen=True, slots=True)
class DataWarning:
    """A warning about the records of a build.

    Attributes:
        kind: Its name in the ledger.
        number: The number of records (or sequences, or partitions) that it concerns; 0: not known.
        file: The file, or name of the source, of the first of them; "" if it is not known.
        line: The line of the first of them, from 1.
    """

    kind: str
    number: int = 0
    file: str = ""
    line: int = 0

    def render(self, names: SettingNames | None = None) -> str:
        """Return the warning as text.

        Args:
            names: The form of settings; by default that of Python.
        """
        kind = KINDS.get(self.kind, _Kind("record", self.kind.replace("_", " ")))
        facts = []
        if self.number:
            facts.append(f"{self.number:,} {kind.counted}{'s' * (self.number != 1)}")
        if self.file:
            facts.append(f"first in {source_name(self.file)}:{self.line}")
        text = kind.text + (f" ({', '.join(facts)})" if facts else "")
        if kind.remedy:
            text += f"; {kind.remedy}"
        return render_settings(text, names or PythonNames())


def data_warnings(manifest: Manifest) -> list[DataWarning]:
    """Return the warnings about the data of a build."""
    found = manifest.accounting.warnings
    known = [kind for kind in KINDS if kind in found]
    others = [kind for kind in found if kind not in KINDS]
    return [
        DataWarning(kind, found[kind], *(manifest.locate_warning(kind) or ("", 0)))
        for kind in (*known, *others)
    ]
