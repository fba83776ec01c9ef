"""Settings by the names of other programs, and lengths such as 4k.

They are replaced before the settings are checked, on the command line and in configuration files.
Each stands for one setting of this program, so nothing else changes: the defaults of the other
programs do not come with it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from sftprep.errors import ConfigError, setting

_NAMES = {
    # TRL
    "max_seq_length": "max_length",
    "dataset_text_field": "text_field",
    "chat_template_path": "chat_template",
    "dataset_num_proc": "workers",
    "packing_strategy": "packing",
    # LLaMA-Factory and axolotl
    "cutoff_len": "max_length",
    "default_system": "system",
    "sequence_len": "max_length",
}
"""Other names of settings with the same values."""
_SHARES = frozenset({"val_size", "val_set_size"})
"""Names of `eval_fraction` in programs that accept a number of records as well."""
_SIDES = {"keep_start": "right", "keep_end": "left"}
_BOOLEANS = {"true": True, "false": False}
_SWITCHES = frozenset({"assistant_only_loss", "packing"})
"""Settings that other programs turn on and off."""
_LENGTHS = frozenset({"max_length", "eval_max_length"})
_REPLACED = frozenset({*_NAMES, *_SWITCHES, *_SHARES, *_LENGTHS, "truncation_mode"})
"""Names whose values are looked at."""
_TARGETS = frozenset(
    {*_NAMES.values(), "output", "packing", "train_on", "truncate_side", "eval_fraction"}
)
"""Settings that have several names."""
_THOUSANDS = re.compile(r"\d+[kK]")
_FLAG = re.compile(r"--([A-Za-z][\w-]*)(?:=(.*))?", re.DOTALL)


class _Setting(NamedTuple):
    """A setting, or another argument.

    Attributes:
        written: What the user wrote.
        name: The name in this program; "" for another argument.
        value: The value; None if it is not known.
        tokens: The arguments that replace it.
    """

    written: str
    name: str = ""
    value: Any = None
    tokens: tuple[str, ...] = ()


def replace_aliases(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a file with the names and values of this program.

    Raises:
        ConfigError: A value has no counterpart, or a setting occurs under two names.
    """
    replaced = (
        _Setting(written, *found)
        for written, value in settings.items()
        if (found := replace_alias(written, value)) is not None
    )
    return {each.name: each.value for each in _separate(replaced)}


def _separate(settings: Iterable[_Setting]) -> list[_Setting]:
    """Return settings that have one name each.

    As in TRL, a `packing_strategy` has no effect if `packing` is off.

    Raises:
        ConfigError: A setting occurs under two names.
    """
    settings = list(settings)
    if any((_to_name(each.written), each.value) == ("packing", "none") for each in settings):
        settings = [each for each in settings if _to_name(each.written) != "packing_strategy"]
    written: dict[str, str] = {}
    for each in settings:
        if each.name in _TARGETS and written.setdefault(each.name, each.written) != each.written:
            raise ConfigError(
                f"{written[each.name]} and {each.written} are names of the same setting",
                remedy="keep one of them",
            )
    return settings


def replace_alias(name: str, value: Any) -> tuple[str, Any] | None:
    """Return the name and the value of a setting in this program.

    Args:
        name: The name, with underscores.
        value: The value, as text or as YAML represents it.

    Returns:
        None if the value is the default of this program.

    Raises:
        ConfigError: The value has no counterpart.

    Example:
        "assistant_only_loss", True  ->  "train_on", "assistant"
        "max_seq_length", "4k"       ->  "max_length", 4096
    """
    if name in _SWITCHES:
        is_on = _BOOLEANS.get(value.lower(), value) if isinstance(value, str) else value
        if name == "packing":
            if not isinstance(is_on, bool):
                return name, value
            return None if is_on else (name, "none")
        if not isinstance(is_on, bool):
            raise ConfigError(
                f"{setting(name)} is {value}", remedy=f"use {setting('train_on', 'assistant')}"
            )
        return ("train_on", "assistant") if is_on else None
    if name == "truncation_mode":
        if value not in _SIDES:
            raise ConfigError(
                f"{setting(name)} is {value}",
                remedy=f"use keep_start or keep_end, or {setting('truncate_side')}",
            )
        return "truncate_side", _SIDES[value]
    if name in _SHARES:
        if not 0 <= _to_float(value) < 1:
            raise ConfigError(
                f"{name} is {value}",
                remedy=f"use a share of the records, such as {setting('eval_fraction', '0.05')}",
            )
        return "eval_fraction", value
    name = _NAMES.get(name, name)
    if name in _LENGTHS and isinstance(value, str) and _THOUSANDS.fullmatch(value):
        value = 1024 * int(value[:-1])
    return name, value


def replace_flags(tokens: Sequence[str]) -> Iterator[str]:
    """Yield the arguments of a command with the flags and values of this program.

    Raises:
        ConfigError: The value of a flag has no counterpart, or a setting occurs under two names.

    Example:
        --assistant_only_loss --max_seq_length 4k -o out
            ->  --train-on assistant --max-length 4096 --output out
    """
    for each in _separate(_read_flags(tokens)):
        yield from each.tokens


def _read_flags(tokens: Sequence[str]) -> Iterator[_Setting]:
    rest = [*reversed(tokens)]
    while rest:
        token = rest.pop()
        if token == "--":
            yield _Setting(token, tokens=(token, *reversed(rest)))
            return
        if token == "-o":
            yield _Setting(token, "output", tokens=("--output",))
            continue
        flag = _FLAG.fullmatch(token)
        written, value = (f"--{flag[1]}", flag[2]) if flag else (token, None)
        name = _to_name(written) if flag else ""
        if name not in _REPLACED:
            yield _Setting(written, name, tokens=(token,))
            continue
        if value is None and rest and (name != "assistant_only_loss" or rest[-1] in _BOOLEANS):
            value = rest.pop()
        if value is None and name not in _SWITCHES:  # the parser reports it
            name = _NAMES.get(name, name)
            yield _Setting(written, name, tokens=(_to_flag(name),))
            continue
        replaced = replace_alias(name, True if value is None else value)
        if replaced is not None:
            yield _Setting(written, *replaced, tokens=(_to_flag(replaced[0]), str(replaced[1])))


def _to_name(written: str) -> str:
    return written.lstrip("-").replace("-", "_")


def _to_flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _to_float(value: Any) -> float:
    """Return a number, or NaN for something else."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return math.nan
