"""The permitted values of settings, and the checks for all others.

The functions take the `label` of a setting for their errors: usually a reference,
`setting("max_length")`, or a phrase such as "the weight of chats.jsonl".
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from sftprep.config.parsing import parse_json
from sftprep.errors import ConfigError

FormatName = Literal[
    "auto", "text", "messages", "prompt-completion", "sharegpt", "alpaca", "tokens"
]
TrainOn = Literal["auto", "all", "completion", "assistant", "last-assistant"]
TrainEnd = Literal["turn", "last", "none"]
TrainRole = Literal["assistant", "user", "system", "tool"]
Packing = Literal["bfd", "bfd_split", "exact", "wrapped", "none"]
EvalPacking = Literal["bfd", "none"]
Overlong = Literal["truncate", "split", "drop", "error"]
TruncateSide = Literal["right", "left"]
Order = Literal["keep", "shuffle"]
Layout = Literal["packs", "sequences"]
OnBadRecord = Literal["error", "quarantine"]
QualityChecks = Literal["auto", "keep", "reject"]
Duplicates = Literal["keep", "drop"]
MixBy = Literal["records", "tokens", "trained_tokens"]
Reasoning = Literal["template", "keep", "expand", "drop"]
YesNo = Literal["yes", "no"]
SeriousOmission = Literal[
    "message_not_shown",
    "reasoning_not_shown",
    "call_not_shown",
    "argument_not_shown",
    "text_with_call_not_shown",
]
"""The kinds of content that can reject a record if the chat template omits them."""
Images = Literal["error", "drop"]
TextUnit = Literal["line", "file"]
ExecutorChoice = Literal["local", "ray"]
EncoderChoice = Literal["auto", "gigatoken", "fastokens", "tokenizers"]
TemplateBackend = Literal["auto", "jinja"]

RESERVED_VARIABLES = frozenset(
    {
        "messages",
        "conversation",
        "conversations",
        "tools",
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
    }
)
"""Parameters of `apply_chat_template`: a template variable cannot have one of these names."""


def unknown_setting(name: str, known: list[str], where: str = "") -> ConfigError:
    """Return the error for an unknown setting, with the most similar known name."""
    # Plain names and not references: the name is shown as it is written in a config file.
    similar = difflib.get_close_matches(name, known, n=1)
    return ConfigError(
        f"unknown setting {name!r} {where}".rstrip(),
        remedy=f"did you mean {similar[0]!r}?" if similar else f"use one of: {', '.join(known)}",
    )


def to_strings(value: Any) -> tuple[str, ...]:
    """Convert one string or path, or several, to a tuple of strings."""
    if isinstance(value, (str, Path)):
        value = (value,)
    return tuple(str(item) for item in value)


def check_strings(value: Any, label: str) -> tuple[str, ...]:
    """Convert one string or path, or a list of them, to a tuple of strings.

    Raises:
        ConfigError: The value is something else.
    """
    items = (value,) if isinstance(value, (str, Path)) else value
    if not isinstance(items, (list, tuple)) or not all(
        isinstance(item, (str, Path)) for item in items
    ):
        raise ConfigError(f"{label} is {value!r}", remedy="use a string or a list of strings")
    return to_strings(value)


def split_list(entries: Iterable[str]) -> tuple[str, ...]:
    """Return the items of comma-separated lists.

    Example:
        ["a, b", "c"]  ->  ("a", "b", "c")
    """
    return tuple(item.strip() for entry in entries for item in entry.split(",") if item.strip())


def check_type(value: object, label: str, kind: type, description: str) -> None:
    """Raise ConfigError if a value is neither None nor of the type `kind`."""
    if value is not None and not isinstance(value, kind):
        raise ConfigError(f"{label} is {value!r}", remedy=f"use {description}")


def to_number(value: Any) -> Any:
    """Convert a numeric string to its number, and keep any other value.

    YAML reads `1e-3` as a string.
    """
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def check_limit(limit: int | None, label: str) -> None:
    """Raise ConfigError unless a limit is None or an integer of 1 or more."""
    if limit is not None and (type(limit) is not int or limit < 1):  # True is not a number
        raise ConfigError(
            f"{label} is {limit!r}", remedy="use a whole number of records, 1 or more"
        )


def check_integer(value: object, label: str, low: int, high: int) -> None:
    """Raise ConfigError unless a value is None or an integer from `low` to `high`."""
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high
    ):
        raise ConfigError(
            f"{label} is {value!r}", remedy=f"use a whole number from {low} to {high}"
        )


def check_number(value: object, label: str, low: float, high: float) -> None:
    """Raise ConfigError if a value is not a number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ConfigError(f"{label} is {value!r}", remedy=f"use a number from {low:g} to {high:,g}")


def check_choice(label: str, value: object, choices_type: Any) -> None:
    """Raise ConfigError if a value is not one of the values of a Literal."""
    choices = get_args(choices_type)
    if value not in choices:
        raise ConfigError(f"{label} is {value!r}", remedy=f"choose one of: {', '.join(choices)}")


def expand_path(path: str, label: str) -> str:
    """Return a path with `~` and `~user` expanded.

    Raises:
        ConfigError: The path has a NUL character.
    """
    if "\0" in path:
        raise ConfigError(f"{label} is {path!r}, with a NUL character", remedy="remove it")
    return os.path.expanduser(path)


def local_folder(path: str, label: str) -> str:
    """Return the path of an output folder, with `~` and `~user` expanded.

    Raises:
        ConfigError: The path is not on a local disk (see `check_local_path`), or contains the name
            of a user that does not exist.
    """
    expanded = expand_path(path, label)
    check_local_path(expanded, label)
    if expanded.startswith("~"):
        raise ConfigError(
            f"{label} is {path}, and there is no such user",
            remedy=f"write ./{path} if you mean a local folder of this name",
        )
    return expanded


def to_json_object(value: object, label: str, example: str) -> str | None:
    """Return a JSON object as text; None stays None.

    Text can be hashed and stored, and keeps the order of the keys, which a template may show.

    Args:
        value: An object, or the text of one.
        label: The setting, for errors.
        example: What the remedy shows.

    Raises:
        ConfigError: The value is not a JSON object, or has a key twice.
    """
    if value is None:
        return None
    remedy = f"write a JSON object such as {example}"
    try:
        parsed = parse_json(value, label) if isinstance(value, str) else value
        text = json.dumps(parsed, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{label} is {value!r}, which is not JSON", remedy=remedy) from error
    if not isinstance(parsed, Mapping):
        raise ConfigError(f"{label} is {value!r}, not a JSON object", remedy=remedy)
    return text


def template_variables(value: object, label: str) -> str | None:
    """Return the variables of chat templates as text; None stays None.

    Raises:
        ConfigError: The value is not a JSON object, or templates have no such variable.
    """
    text = to_json_object(value, label, example='{"enable_thinking": false}')
    if reserved := RESERVED_VARIABLES.intersection(json.loads(text or "{}")):
        raise ConfigError(
            f"{label} has {min(reserved)!r}, which is not a variable of templates",
            remedy=f"remove {min(reserved)!r}",
        )
    return text


def check_message(value: object, label: str) -> None:
    """Raise ConfigError unless a value is None or a text that a message may have."""
    check_type(value, label, str, "a text")
    if not isinstance(value, str):
        return
    if not value.strip():
        raise ConfigError(f"{label} is empty", remedy=f"leave out {label}, or write a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{label} is not UTF-8", remedy="write it in UTF-8") from error


def is_url(path: object) -> bool:
    """Return whether a path is a string that starts with a protocol, such as `s3://`."""
    return isinstance(path, str) and _PROTOCOL.match(path) is not None


def output_place(path: str, label: str) -> str:
    """Return the path or URL of an output folder, as `local_folder` does for a path.

    Raises:
        ConfigError: It is neither.
    """
    return path if is_url(path) else local_folder(path, label)


def parse_part(part: str | None, label: str) -> tuple[int, int] | None:
    """Return the number of a part, from 1, and the number of parts; None if there are none.

    Args:
        part: `I/K`, or None.
        label: The setting, for errors.

    Raises:
        ConfigError: It is something else, or I is not between 1 and K.
    """
    if part is None:
        return None
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", part)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(
            f"{label} is not a part", remedy="write I/K with I from 1 to K, such as 3/16"
        )
    return int(match[1]), int(match[2])


def check_local_path(path: str, label: str) -> None:
    """Raise ConfigError for a URL, a path of another system, or invalid UTF-8.

    A URL would otherwise be used as a relative path. A colon in the first component is sufficient,
    since `Path("s3://bucket/x")` is `s3:/bucket/x`. Only Windows has drives (`C:/x`).
    """
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{label} is {printable(path)}, which is not UTF-8", remedy="choose another name"
        ) from error
    stripped = path.strip()
    if os.name == "nt" and re.match(r"[A-Za-z]:[\\/]", stripped):
        return
    if "://" in stripped or ":" in stripped.partition("/")[0] or stripped.startswith("\\\\"):
        local = re.sub(r"/+", "/", stripped)  # as the operating system reads the path
        raise ConfigError(
            f"{label} is {path}: URLs are not supported, nor are paths of other systems",
            remedy="use a path on a local disk, and copy the data with the tools of the store; for"
            f" a local path of this name, write {local if local.startswith('/') else './' + local}",
        )


_PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def printable(path: str) -> str:
    """Return a path with escapes for invalid UTF-8."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
