"""Conversion of the YAML of axolotl: its `datasets:`, and the settings that concern data."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

from sftprep.chat_template.shipped import SHIPPED_TEMPLATES
from sftprep.errors import ConfigError
from sftprep.exchange.imports.axolotl_sources import convert_source
from sftprep.exchange.imports.converted import Conversion

_OVERLONG = {"drop": "drop", "truncate": "truncate", "raise": "error"}
_TEMPLATES_OF_THE_TOKENIZER = (None, "tokenizer_default")


def is_axolotl(content: object) -> bool:
    """Return whether the content of a YAML file is a configuration of axolotl."""
    return isinstance(content, dict) and isinstance(content.get("datasets"), list)


def convert_axolotl(content: dict[str, Any]) -> Conversion:
    """Convert the settings of axolotl that concern data to those of a build.

    Raises:
        ConfigError: None of the data sets can be converted.
    """
    conversion = Conversion()
    settings = conversion.settings
    settings["sources"] = []
    for number, entry in enumerate(content["datasets"]):
        name = f"datasets[{number}]"
        for source in convert_source(name, entry, content, conversion):
            conversion.add_source(name, source)
    if not settings["sources"]:
        raise ConfigError(
            f"none of the data sets can be converted: {'; '.join(conversion.notes[:3])}",
            remedy="convert their records with a transform (docs/formats.md)",
        )
    tokenizer = content.get("tokenizer_config") or content.get("base_model")
    if tokenizer:
        settings["tokenizer"] = tokenizer
    # These have a value in axolotl even where the file has none.
    settings["packing"] = "bfd" if content.get("sample_packing") else "none"
    settings["overlong"] = _OVERLONG.get(content.get("excess_length_strategy") or "drop", "drop")
    for name, value in content.items():
        if name in _CONVERTERS:
            if value is not None:
                _CONVERTERS[name](conversion, value, content)
        elif name not in _READ and value not in (None, False):
            conversion.skip(name, value)
    return conversion


# --- settings of the whole file -------------------------------------------------------------------


def _set(name: str) -> Callable[[Conversion, Any, dict[str, Any]], None]:
    return lambda conversion, value, _: conversion.settings.update({name: value})


def _convert_template(conversion: Conversion, value: Any, content: dict[str, Any]) -> None:
    template = content.get("chat_template_jinja")
    if value in _TEMPLATES_OF_THE_TOKENIZER:
        return
    if value in SHIPPED_TEMPLATES:
        conversion.settings["chat_template"] = value
    elif value == "jinja" and isinstance(template, str) and is_file_name(template):
        conversion.settings["chat_template"] = template
    elif value == "jinja":
        conversion.skip("chat_template_jinja", template, "save it to a file: chat_template: FILE")
    else:
        conversion.skip(
            "chat_template", value, "the template of the tokenizer is used; chat_template: FILE"
        )


def _convert_template_text(conversion: Conversion, value: Any, content: dict[str, Any]) -> None:
    if content.get("chat_template") != "jinja":
        conversion.skip("chat_template_jinja", value, "chat_template is not jinja")


def _convert_held_out(conversion: Conversion, value: Any, _: dict[str, Any]) -> None:
    if isinstance(value, (int, float)) and 0 <= value < 1:
        if value:
            conversion.settings["eval_fraction"] = float(value)
    else:
        conversion.skip("val_set_size", value, "use a share of the records: eval_fraction: 0.05")


def _convert_test_sets(conversion: Conversion, value: Any, content: dict[str, Any]) -> None:
    """Convert evaluation data: files, or another split of the only data set."""
    entries = [entry for entry in value if isinstance(entry, dict)]
    paths = [entry.get("path") for entry in entries]
    sources = conversion.settings["sources"]
    plain = all(set(entry) <= {"path", "type", "ds_type", "split"} for entry in entries)
    is_other_split = (
        len(entries) == len(sources) == 1
        and paths[0] == content["datasets"][0].get("path")
        and bool(entries[0].get("split"))
    )
    if is_other_split:
        conversion.settings["eval_split"] = entries[0]["split"]
    elif plain and all(entry.get("split") in (None, "train") for entry in entries):
        conversion.settings["eval_input"] = paths
    else:
        conversion.skip("test_datasets", value, "use eval_input: FILES or eval_split: NAME")


def _convert_special_tokens(conversion: Conversion, value: Any, _: dict[str, Any]) -> None:
    for name, token in value.items():
        if name == "eos_token":
            conversion.settings["eos_token"] = token
        elif name == "pad_token":
            conversion.skip(f"special_tokens.{name}", token, "packs have no padding")
        else:
            conversion.skip(f"special_tokens.{name}", token, "change the tokenizer")


def _convert_duplicates(conversion: Conversion, value: Any, _: dict[str, Any]) -> None:
    if value:
        conversion.settings["duplicates"] = "drop"


def _convert_eval_packing(conversion: Conversion, value: Any, _: dict[str, Any]) -> None:
    conversion.settings["eval_packing"] = "bfd" if value else "none"


def _convert_training_on_inputs(conversion: Conversion, value: Any, _: dict[str, Any]) -> None:
    if value:
        conversion.differ(
            "train_on_inputs", value, "every token is trained, also between the turns"
        )


_CONVERTERS: dict[str, Callable[[Conversion, Any, dict[str, Any]], None]] = {
    "sequence_len": _set("max_length"),
    "seed": _set("seed"),
    "chat_template": _convert_template,
    "chat_template_jinja": _convert_template_text,
    "val_set_size": _convert_held_out,
    "test_datasets": _convert_test_sets,
    "special_tokens": _convert_special_tokens,
    "dataset_exact_deduplication": _convert_duplicates,
    "eval_sample_packing": _convert_eval_packing,
    "train_on_inputs": _convert_training_on_inputs,
}
"""By the name of a setting, the function that converts it."""

_READ = {
    *("datasets", "tokenizer_config", "base_model", "sample_packing", "excess_length_strategy"),
}
"""Settings that are read elsewhere."""


def is_file_name(template: str) -> bool:
    """Return whether a setting for a template is a file, and not the template itself."""
    return os.path.isfile(template) or re.fullmatch(r"[\w./~ -]+", template) is not None
