"""The values that settings may have, and how a wrong one is refused."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any, Literal, get_args

from sftprep.errors import ConfigError

FormatName = Literal[
    "auto", "text", "messages", "prompt-completion", "sharegpt", "alpaca", "tokens"
]
TrainOn = Literal["auto", "all", "completion", "assistant", "last-assistant"]
Packing = Literal["bfd", "bfd_split", "wrapped", "none"]
EvalPacking = Literal["bfd", "none"]
Overlong = Literal["truncate", "split", "drop", "error"]
TruncateSide = Literal["right", "left"]
Order = Literal["keep", "shuffle"]
OnBadRecord = Literal["error", "quarantine"]
QualityChecks = Literal["auto", "keep", "reject"]
Duplicates = Literal["keep", "drop"]
EncoderChoice = Literal["auto", "gigatoken", "tokenizers"]
TemplateWay = Literal["auto", "jinja"]


def unknown_setting(name: str, known: list[str], where: str = "") -> ConfigError:
    """What to say of a setting that is not known, with the nearest one that is."""
    near = difflib.get_close_matches(name, known, n=1)
    return ConfigError(
        f"unknown setting {name!r} {where}".rstrip(),
        remedy=f"did you mean {near[0]!r}?" if near else f"known settings: {', '.join(known)}",
    )


def strings(value: Any) -> tuple[str, ...]:
    """One string or several, as a tuple."""
    if isinstance(value, (str, Path)):
        value = (value,)
    return tuple(str(item) for item in value)


def check_strings(value: Any, name: str) -> tuple[str, ...]:
    """As `strings`. Raises ConfigError for what is neither text nor a list of texts."""
    items = (value,) if isinstance(value, (str, Path)) else value
    if not isinstance(items, (list, tuple)) or not all(
        isinstance(item, (str, Path)) for item in items
    ):
        raise ConfigError(f"{name} is {value!r}", remedy="give text, or a list of texts")
    return strings(value)


def check_kind(value: object, name: str, kind: type, what: str) -> None:
    """Raises ConfigError for a value of another kind; None is none given."""
    if value is not None and not isinstance(value, kind):
        raise ConfigError(f"{name} is {value!r}", remedy=f"give {what}")


def number_of(value: Any) -> Any:
    """The number that a text spells, for YAML takes `1e-3` for text; anything else as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def check_limit(limit: int | None, name: str) -> None:
    """Raises ConfigError for what is no whole number of records, 1 or more."""
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ConfigError(
            f"{name} is {limit!r}", remedy="give a whole number of records, 1 or more"
        )


def check_whole(value: object, name: str, low: int, high: int) -> None:
    """Raises ConfigError for what is no whole number from `low` to `high`; None is none given."""
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high
    ):
        raise ConfigError(
            f"{name} is {value!r}",
            remedy=f"give --{name.replace('_', '-')} a whole number from {low} to {high}",
        )


def check_factor(factor: object, name: str, low: float, high: float) -> None:
    """Raises ConfigError for what is no number from `low` to `high`."""
    if (
        isinstance(factor, bool)
        or not isinstance(factor, (int, float))
        or not low <= factor <= high
    ):
        raise ConfigError(
            f"{name} is {factor!r}", remedy=f"give a number from {low:g} to {high:,g}"
        )


def check_choice(name: str, value: object, kind: Any) -> None:
    """Raises ConfigError for a value that is none of a Literal's."""
    choices = get_args(kind)
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}", remedy=f"choose one of: {', '.join(choices)}")


def expand_path(path: str, name: str) -> str:
    """Return a path with `~` and `~user` expanded. Raises ConfigError for a NUL character."""
    if "\0" in path:
        raise ConfigError(f"{name} is {path!r}, with a NUL character", remedy="remove it")
    return os.path.expanduser(path)


def local_folder(path: str, name: str) -> str:
    """Return the path of a folder that is written to, with `~` and `~user` expanded.

    Raises:
        ConfigError: it is not a path on a local disk, as `check_local_path` says, or is of a user
            that does not exist.
    """
    expanded = expand_path(path, name)
    check_local_path(expanded, name)
    if expanded.startswith("~"):
        raise ConfigError(
            f"{name} is {path}, and there is no such user",
            remedy=f"for a local folder of this name, write ./{path}",
        )
    return expanded


def check_local_path(path: str, name: str) -> None:
    """Raises ConfigError for a URL or a path of another system, which would otherwise be taken for
    a relative path.

    A colon in the first component is enough, since `Path("s3://bucket/x")` is `s3:/bucket/x`. Only
    Windows has drives (`C:/x`).
    """
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{name} is {printable(path)}, which is not UTF-8", remedy="choose another name"
        ) from error
    bare = path.strip()
    if os.name == "nt" and re.match(r"[A-Za-z]:[\\/]", bare):
        return
    if "://" in bare or ":" in bare.partition("/")[0] or bare.startswith("\\\\"):
        local = re.sub(r"/+", "/", bare)
        raise ConfigError(
            f"{name} is {path}: URLs are not supported, nor are paths of other systems",
            remedy="give a path on a local disk, and copy the data with the tools of the store; for"
            f" a local path of this name, write {local if local.startswith('/') else './' + local}",
        )


def printable(path: str) -> str:
    """Return a path with the bytes that are not UTF-8 as escapes."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
