"""Checks of conversations: their tool calls, and what is valid and looks wrong.

A careful person would not train on conversations that look wrong, but TRL does, and so does a build
by default, which counts them. The format of a record is not checked here.

The checks run for every conversation of a build, so what holds for nearly all of them is tested
first: turns of the user and the assistant that alternate, none of them empty.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

from sftprep.core.byte_search import ByteSearcher
from sftprep.core.json_values import iter_leaves
from sftprep.core.types import Counts, Example, Message
from sftprep.records.checks.call_checks import check_calls
from sftprep.records.options import InvalidRecord, Record
from sftprep.records.roles import PASSED_ROLES, SYSTEM_ROLES
from sftprep.tokenize.loading.spec import TokenizerSpec

REASONS = frozenset(
    {"no_target", "role_order", "bad_tool", "empty_turn", "empty_target", "special_tokens_in_text"}
)

_PLACEHOLDERS = ("<image>", "<video>", "<audio>")
_MEDIA_KEYS = frozenset({"images", "image", "videos", "video", "audios", "audio"})
_TOOL_ROLES = ("tool", *PASSED_ROLES)
_MOST_ROLES_KEPT = 16
"""Longer sequences of roles are examined each time."""
_ROLE, _CONTENT = itemgetter("role"), itemgetter("content")


class _Problem(NamedTuple):
    reason: str  # one of REASONS
    message: str


class QualityChecks:
    """The checks for one tokenizer.

    The reasons are: `no_target` (no message of the assistant), `role_order`, `bad_tool` (the result
    of a tool that was not called), `empty_turn`, `empty_target`, and `special_tokens_in_text`
    (special tokens of the tokenizer, or placeholders of media that the tokenizer or the record
    has). Examples that are not conversations pass.

    Args:
        spec: The tokenizer.
        escaped: Whether special tokens in texts are escaped, so that they are harmless.
        rejects: Whether conversations that look wrong are rejected; else they are counted.
    """

    def __init__(self, spec: TokenizerSpec, *, escaped: bool, rejects: bool) -> None:
        self._rejects = rejects
        tokens = {t["content"]: bool(t.get("special")) for t in spec.part("added_tokens") or ()}
        # Special tokens in texts are counted when a record is rendered; they are searched for here
        # only to reject the record.
        special = {token for token, is_special in tokens.items() if is_special}
        media = {token for token in _PLACEHOLDERS if token in tokens}
        words = media - special | (special if rejects and not escaped else set())
        self._words = tuple(words)
        self._pattern = _pattern_of(words)
        self._pattern_with_media = _pattern_of(words | set(_PLACEHOLDERS))

    def find_lines_to_search(self, data: ByteSearcher) -> Container[int]:
        """Return the lines of JSON with texts that may contain what makes them look wrong."""
        return data.find_lines(self._words) if self._words else ()

    def check(self, example: Example, record: Record, counts: Counts, *, search: bool) -> None:
        """Check an example.

        Args:
            example: The example.
            record: The record that it was made from.
            counts: Receives the warnings.
            search: Whether the line of the record is one of `find_lines_to_search`.

        Raises:
            InvalidRecord: A tool call cannot be used, or the conversation looks wrong and such
                conversations are rejected.
        """
        messages = example.messages
        if messages is None:
            return
        if example.bare and not search and len(record) == 1 and _is_usual(messages):
            return
        may_call = not example.bare
        try:
            contents: list[Any] = [*map(_CONTENT, messages)]
        except KeyError:  # a message that only calls tools
            contents, may_call = [message.get("content") for message in messages], True
        if may_call and check_calls(messages, example.tools):
            counts.warn("unknown_tool", example.line)
        roles = tuple(map(_ROLE, messages))
        find_problems = _known_order_problems if len(roles) <= _MOST_ROLES_KEPT else _order_problems
        problems = find_problems(roles)
        if not _are_filled(contents):
            problems = (*problems, *_empty_problems(messages, contents))
        if search or not _MEDIA_KEYS.isdisjoint(record):
            problems = (*problems, *self._special_problems(example, contents, record))
        if not problems:
            return
        if self._rejects:
            counts.warn("suspects_rejected", example.line)
            raise InvalidRecord(problems[0].reason, problems[0].message)
        # What the renderer finds as well is counted once.
        for reason in dict.fromkeys(problem.reason for problem in problems):
            is_special = reason == "special_tokens_in_text"
            counts.warn_once("special_token_in_content" if is_special else reason, example.line)

    def _special_problems(
        self, example: Example, contents: Sequence[Any], record: Record
    ) -> Iterator[_Problem]:
        """Yield the first special token or placeholder, if there is one."""
        has_media = any(record[key] for key in _MEDIA_KEYS.intersection(record))
        pattern = self._pattern_with_media if has_media else self._pattern
        for number, content in enumerate(contents, 1):
            found = pattern.search(content) if isinstance(content, str) else None
            if found is not None:
                yield _Problem("special_tokens_in_text", f"message {number} has {found[0]!r}")
                return
        # Reasoning, names and calls, and then the tools.
        for number, message in enumerate(example.messages or (), 1):
            is_plain = len(message) == 2 and isinstance(message.get("content"), str)
            word = None if is_plain else self._find_word(message)
            if word is not None:
                yield _Problem("special_tokens_in_text", f"message {number} has {word!r}")
                return
        word = self._find_word(example.tools)
        if word is not None:
            yield _Problem("special_tokens_in_text", f"a tool has {word!r}")

    def _find_word(self, value: Any) -> str | None:
        """Return the first word of the pattern in the strings and keys of JSON values, or None."""
        strings = (leaf for leaf in iter_leaves(value, with_keys=True) if isinstance(leaf, str))
        found = next(filter(None, map(self._pattern.search, strings)), None)
        return None if found is None else found[0]


def _pattern_of(words: set[str]) -> re.Pattern[str]:
    # Longer words first: the regular expression takes the first alternative that matches.
    ordered = sorted(words, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


def _is_usual(messages: list[Message]) -> bool:
    """Return whether the user and the assistant alternate, and no message is empty.

    This decides most conversations; the other checks accept them as well.
    """
    expected, following = "user", "assistant"
    try:
        for message in messages:
            if message["role"] != expected or not message["content"].strip():
                return False
            expected, following = following, expected
    except (KeyError, AttributeError):  # no content, or one that is not a string
        return False
    return len(messages) > 1


def _order_problems(roles: tuple[str, ...]) -> tuple[_Problem, ...]:
    """Return the problems of a sequence of roles, of each kind the first one."""
    start = roles[0] in SYSTEM_ROLES
    answers = roles[start + 1 :: 2]
    if answers and roles[start::2].count("user") + answers.count("assistant") + start == len(roles):
        return ()
    found: dict[str, _Problem] = {}
    if "assistant" not in roles:
        found["no_target"] = _Problem(
            "no_target", "no message is from the assistant, so there is nothing to learn"
        )
    pairs = enumerate(zip([None, *roles], roles, strict=False), 1)
    for number, (before, role) in pairs:
        problem = _turn_problem(number, before, role)
        if problem is not None:
            found.setdefault(problem.reason, problem)
    return tuple(found.values())


# Most conversations have one of a few sequences of roles.
_known_order_problems = lru_cache(maxsize=1024)(_order_problems)


def _turn_problem(number: int, previous_role: str | None, role: str) -> _Problem | None:
    """Return what is wrong with the role of a message after that of the one before."""
    if role in SYSTEM_ROLES and number > 1:
        return _Problem(
            "role_order", f"message {number} is from the {role}, but only the first message may be"
        )
    if role == "assistant" and previous_role in (None, *SYSTEM_ROLES):
        return _Problem(
            "role_order",
            f"message {number} is from the assistant, but no message of a user precedes it",
        )
    if role == "assistant" and previous_role == "assistant":
        return _Problem(
            "role_order", f"messages {number - 1} and {number} are both from the assistant"
        )
    # Several results may follow a message that calls several tools. Two messages of the user in a
    # row are common and harmless.
    if role in _TOOL_ROLES and previous_role not in ("assistant", *_TOOL_ROLES):
        return _Problem(
            "bad_tool",
            f"message {number} is from a tool, but the message before it is not from the assistant"
            " or a tool",
        )
    return None


def _are_filled(contents: Sequence[Any]) -> bool:
    """Return whether all contents are strings that are more than whitespace."""
    try:
        return all(map(str.strip, contents))
    except TypeError:  # a content that is not a string
        return False


def _empty_problems(messages: list[Message], contents: Sequence[Any]) -> Iterator[_Problem]:
    """Yield the messages of the user and the assistant that are empty."""
    for number, (message, content) in enumerate(zip(messages, contents, strict=True), 1):
        if content and not (isinstance(content, str) and content.isspace()):
            continue
        if message["role"] == "user":
            yield _Problem("empty_turn", f"message {number} is from the user and is empty")
        # A message that only calls tools has no content.
        if message["role"] == "assistant" and not message.get("tool_calls"):
            others = sorted(key for key in message if key not in ("role", "content"))
            besides = f" besides {', '.join(map(repr, others))}" if others else ""
            yield _Problem(
                "empty_target", f"message {number} is from the assistant and is empty{besides}"
            )
