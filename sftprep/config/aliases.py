"""Settings by the names of other programs, and lengths such as 4k.

They are replaced before the settings are checked, on the command line and in configuration files.
Each stands for one setting of this program, so nothing else changes: the defaults of the other
programs do not come with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

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
_SIDES = {"keep_start": "right", "keep_end": "left"}
_BOOLEANS = {"true": True, "false": False}
_SWITCHES = frozenset({"assistant_only_loss", "packing"})
"""Settings that other programs turn on and off."""
_LENGTHS = frozenset({"max_length", "eval_max_length"})
_THOUSANDS = re.compile(r"\d+[kK]")
_FLAG = re.compile(r"--([A-Za-z][\w-]*)(?:=(.*))?", re.DOTALL)


def replace_aliases(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a file with the names and values of this program.

    Raises:
        ConfigError: A value has no counterpart.
    """
    replaced = (replace_alias(name, value) for name, value in settings.items())
    return dict(filter(None, replaced))


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
    name = _NAMES.get(name, name)
    if name in _LENGTHS and isinstance(value, str) and _THOUSANDS.fullmatch(value):
        value = 1024 * int(value[:-1])
    return name, value


def replace_flags(tokens: Sequence[str]) -> Iterator[str]:
    """Yield the arguments of a command with the flags and values of this program.

    Raises:
        ConfigError: The value of a flag has no counterpart.

    Example:
        --assistant_only_loss --max_seq_length 4k -o out
            ->  --train-on assistant --max-length 4096 --output out
    """
    rest = [*reversed(tokens)]
    while rest:
        token = rest.pop()
        if token == "--":
            yield from (token, *reversed(rest))
            return
        if token == "-o":
            yield "--output"
            continue
        flag = _FLAG.fullmatch(token)
        name = flag[1].replace("-", "_") if flag else ""
        if flag is None or name not in {*_NAMES, *_SWITCHES, *_LENGTHS, "truncation_mode"}:
            yield token
            continue
        value: Any = flag[2]
        if value is None and rest and (name != "assistant_only_loss" or rest[-1] in _BOOLEANS):
            value = rest.pop()
        if value is None and name not in _SWITCHES:  # the parser reports it
            yield f"--{_NAMES.get(name, name).replace('_', '-')}"
            continue
        replaced = replace_alias(name, True if value is None else value)
        if replaced is not None:
            yield from (f"--{replaced[0].replace('_', '-')}", str(replaced[1]))
