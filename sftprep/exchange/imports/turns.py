"""Keys and speakers of turns that the reader of records knows (`records/messages.py`)."""

from __future__ import annotations

from sftprep.exchange.imports.converted import SourceConversion
from sftprep.records.roles import to_role

ROLE_KEYS = ("role", "from", "speaker", "author", "type")
"""Keys of the speaker of a turn."""
CONTENT_KEYS = ("content", "value", "text", "parts", "message")
"""Keys of the content of a turn."""


def check_key(source: SourceConversion, name: str, key: object, known: tuple[str, ...]) -> None:
    """Note a key of turns that the reader does not know.

    Args:
        source: The source.
        name: The setting of the other tool that names the key.
        key: The key; None or "" if the setting has its default.
        known: The keys that are read for the same purpose.
    """
    if key and key not in known:
        source.skip(name, key, "rename the key with a transform")


def check_speaker(source: SourceConversion, name: str, speaker: object, role: str) -> None:
    """Note a speaker whom the reader gives another role, or none.

    Args:
        source: The source.
        name: The setting of the other tool that names the speaker.
        speaker: The speaker; None or "" if the setting has its default.
        role: The role that the speaker has in the other tool.
    """
    if speaker and to_role(speaker) != role:
        source.skip(name, speaker, "rename the speaker with a transform")
