"""Checks for conversations that are valid and look wrong.

A careful person would not train on such conversations, but TRL does, and so does a build by
default. The format of a record is not checked here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from sftprep.core.types import Example, Message
from sftprep.records.options import InvalidRecord
from sftprep.tokenize.loading.spec import TokenizerSpec

Check = Callable[[Example], None]

REASONS = frozenset(
    {"no_target", "role_order", "bad_tool", "empty_turn", "empty_target", "special_tokens_in_text"}
)

_PLACEHOLDERS = ("<image>", "<video>", "<audio>")
_SYSTEM_ROLES = ("system", "developer")
_TOOL_ROLES = ("tool", "function", "ipython", "environment")


def make_quality_check(spec: TokenizerSpec, *, escaped: bool) -> Check:
    """Return a function that raises InvalidRecord for a suspicious conversation.

    The reasons are: `no_target` (no message of the assistant), `role_order`, `bad_tool` (the
    result of a tool that was not called), `empty_turn`, `empty_target`, and
    `special_tokens_in_text` (special tokens of the tokenizer, or placeholders of images). Examples
    that are not conversations pass.

    Args:
        spec: The tokenizer.
        escaped: Whether special tokens in texts are escaped, so that they are harmless.
    """
    special = [t["content"] for t in spec.part("added_tokens") or () if t.get("special")]
    # Longer tokens first: the regular expression takes the first alternative that matches.
    words = sorted({*_PLACEHOLDERS, *(() if escaped else special)}, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, words)))

    def check(example: Example) -> None:
        if example.messages is None:
            return
        _check_order([message["role"] for message in example.messages])
        for number, message in enumerate(example.messages, 1):
            _check_content(message, number, pattern)

    return check


def _check_order(roles: Sequence[str]) -> None:
    if "assistant" not in roles:
        raise InvalidRecord(
            "no_target", "no message is from the assistant, so there is nothing to learn"
        )
    before = None
    for number, role in enumerate(roles, 1):
        if role in _SYSTEM_ROLES and number > 1:
            raise InvalidRecord(
                "role_order",
                f"message {number} is from the {role}, but only the first message may be",
            )
        if role == "assistant" and before in (None, *_SYSTEM_ROLES):
            raise InvalidRecord(
                "role_order",
                f"message {number} is from the assistant, but no message of a user precedes it",
            )
        if role == "assistant" and before == "assistant":
            raise InvalidRecord(
                "role_order", f"messages {number - 1} and {number} are both from the assistant"
            )
        # Several results may follow a message that calls several tools.
        if role in _TOOL_ROLES and before not in ("assistant", *_TOOL_ROLES):
            raise InvalidRecord(
                "bad_tool", f"message {number} is from a tool, but the assistant has called none"
            )
        before = role  # two messages of the user in a row are common and harmless


def _check_content(message: Message, number: int, pattern: re.Pattern[str]) -> None:
    content = message.get("content")
    if not isinstance(content, str):
        return
    if not content.strip():
        if message["role"] == "user":
            raise InvalidRecord("empty_turn", f"message {number} is from the user and is empty")
        # A message that only calls tools has no content.
        if message["role"] == "assistant" and not message.get("tool_calls"):
            raise InvalidRecord(
                "empty_target", f"message {number} is from the assistant and is empty"
            )
    found = pattern.search(content)
    if found is not None:
        raise InvalidRecord("special_tokens_in_text", f"message {number} contains {found[0]!r}")
