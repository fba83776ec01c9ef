"""Conversations that can be read and look wrong: what a careful person would not train on, by a
reason each.

Nothing here is about the format: TRL trains on all of these, and so does a build unless it is asked
not to.
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
_HEADS = ("system", "developer")
_ANSWERS = ("tool", "function", "ipython", "environment")


def suspect_check(spec: TokenizerSpec, *, escaped: bool) -> Check:
    """A function that raises InvalidRecord for a suspicious conversation, and leaves everything
    else alone.

    The REASONS: no_target (the assistant says nothing), role_order, bad_tool (a tool answers that
    nobody called), empty_turn, empty_target, special_tokens_in_text (the tokenizer's special
    tokens, unless they are escaped, or placeholders of images).
    """
    special = [t["content"] for t in spec.part("added_tokens") or () if t.get("special")]
    words = sorted({*_PLACEHOLDERS, *(() if escaped else special)}, key=len, reverse=True)
    spelled = re.compile("|".join(map(re.escape, words)))

    def check(example: Example) -> None:
        if example.messages is None:
            return
        _check_order([message["role"] for message in example.messages])
        for number, message in enumerate(example.messages, 1):
            _check_text(message, number, spelled)

    return check


def _check_order(roles: Sequence[str]) -> None:
    if "assistant" not in roles:
        raise InvalidRecord(
            "no_target", "no message is from the assistant: there is nothing to learn"
        )
    before = None
    for number, role in enumerate(roles, 1):
        if role in _HEADS and number > 1:
            raise InvalidRecord(
                "role_order",
                f"message {number} is from the {role}, which speaks first or not at all",
            )
        if role == "assistant" and before in (None, *_HEADS):
            raise InvalidRecord(
                "role_order",
                f"message {number} is from the assistant, and nobody has asked anything",
            )
        if role == "assistant" and before == "assistant":
            raise InvalidRecord(
                "role_order", f"messages {number - 1} and {number} are both from the assistant"
            )
        if role in _ANSWERS and before not in ("assistant", *_ANSWERS):
            raise InvalidRecord(
                "bad_tool", f"message {number} is from a tool, and the assistant has called none"
            )
        before = role


def _check_text(message: Message, number: int, spelled: re.Pattern[str]) -> None:
    content = message.get("content")
    if not isinstance(content, str):
        return
    if not content.strip():
        if message["role"] == "user":
            raise InvalidRecord("empty_turn", f"message {number} is from the user, and empty")
        if message["role"] == "assistant" and not message.get("tool_calls"):
            raise InvalidRecord(
                "empty_target", f"message {number} is from the assistant, and empty"
            )
    found = spelled.search(content)
    if found is not None:
        raise InvalidRecord("special_tokens_in_text", f"message {number} spells out {found[0]!r}")
