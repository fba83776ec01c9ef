"""Conversion of the `dataset_info.json` of LLaMA-Factory."""

from __future__ import annotations

import os
from typing import Any

from sftprep.errors import ConfigError, setting
from sftprep.exchange.imports.converted import Conversion, SourceConversion
from sftprep.exchange.imports.turns import CONTENT_KEYS, ROLE_KEYS, check_key, check_speaker
from sftprep.records.roles import TOOL_CALL

_LOCATIONS = (
    "hf_hub_url",
    "ms_hub_url",
    "om_hub_url",
    "script_url",
    "cloud_file_name",
    "file_name",
)
"""The settings that name the data, in the order in which LLaMA-Factory tries them."""
_ROLE_TAGS = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": TOOL_CALL,
    "system_tag": "system",
}
"""The role that a speaker with each tag has."""
_MEDIA = ("images", "videos", "audios")
_PAIR = {"prompt": "instruction", "query": "input", "response": "output", "history": "history"}
"""Our keys for the columns of alpaca records."""


def is_dataset_info(content: object) -> bool:
    """Return whether the content of a JSON file describes data sets of LLaMA-Factory."""
    return (
        isinstance(content, dict)
        and bool(content)
        and all(
            isinstance(entry, dict) and not entry.keys().isdisjoint(_LOCATIONS)
            for entry in content.values()
        )
    )


def convert_dataset_info(
    content: dict[str, Any], folder: str, names: tuple[str, ...] = ()
) -> Conversion:
    """Convert data sets to the sources of a build.

    As in LLaMA-Factory, all turns of the assistant are trained, and nothing else.

    Args:
        content: The content of `dataset_info.json`.
        folder: Its folder, to which file names are relative.
        names: The data sets to convert; all that can be, by default.

    Raises:
        ConfigError: A name is unknown, or none of the data sets can be converted.
    """
    for name in names:
        if name not in content:
            raise ConfigError(
                f"unknown data set {name!r}",
                remedy=f"choose from {', '.join(list(content)[:20])}",
            )
    conversion = Conversion({"sources": [], "train_on": "assistant"})
    for name in names or content:
        source = SourceConversion(name, conversion, {})
        if _convert_entry(source, content[name], folder):
            conversion.add_source(name, {**source.settings, "name": name})
    if not conversion.settings["sources"]:
        raise ConfigError(
            f"none of the data sets can be converted: {'; '.join(conversion.notes[:3])}",
            remedy=f"choose others with {setting('datasets')}",
        )
    return conversion


def _convert_entry(source: SourceConversion, entry: dict[str, Any], folder: str) -> bool:
    """Convert a data set; return whether it is a source of a build."""
    columns = entry.get("columns") or {}
    if entry.get("ranking") or "kto_tag" in columns:
        source.skip("ranking", True, "preference data; the data set is left out")
        return False
    if not _convert_location(source, entry, folder):
        return False
    formatting = entry.get("formatting", "alpaca")
    if formatting in ("sharegpt", "openai"):
        _convert_conversation(source, columns, entry.get("tags") or {})
    elif formatting == "alpaca":
        _convert_pair(source, columns)
    else:
        source.skip("formatting", formatting, "the data set is left out")
        return False
    for column in _MEDIA:
        if columns.get(column):
            source.skip(f"columns.{column}", columns[column], "only text is read")
    read = {*_LOCATIONS, "folder", "subset", "split", "num_samples", "formatting"}
    source.skip_rest(entry, {*read, "columns", "tags", "ranking", "file_sha1"})
    return True


def _convert_location(source: SourceConversion, entry: dict[str, Any], folder: str) -> bool:
    """Convert where the data is; return whether a build can read it."""
    kind = next(key for key in _LOCATIONS if entry.get(key))
    settings = source.settings
    if kind == "hf_hub_url":
        in_repository = entry.get("folder")
        settings["path"] = (
            f"hf://datasets/{entry[kind]}/{in_repository}" if in_repository else entry[kind]
        )
    elif kind == "file_name":
        settings["path"] = os.path.join(folder, entry[kind])
    elif kind == "cloud_file_name":
        settings["path"] = entry[kind]
    else:
        source.skip(kind, entry[kind], "the data set is left out; download it, and name its files")
        return False
    if entry.get("subset"):
        settings["config_name"] = entry["subset"]
    if entry.get("split"):
        settings["split"] = entry["split"]
    if entry.get("num_samples"):
        settings["limit"] = entry["num_samples"]
        source.differ("num_samples", entry["num_samples"], "the first ones instead of random ones")
    return True


def _convert_pair(source: SourceConversion, columns: dict[str, Any]) -> None:
    """Convert the columns of alpaca records, or of texts without a response."""
    if columns.get("prompt") and not columns.get("response"):
        source.settings |= {"format": "text", "text_field": columns["prompt"], "train_on": "all"}
        return
    for column, known in _PAIR.items():
        source.rename(columns.get(column), known)
    source.settings["format"] = "alpaca"
    _convert_context(source, columns)


def _convert_conversation(
    source: SourceConversion, columns: dict[str, Any], tags: dict[str, Any]
) -> None:
    known = "messages" if tags.get("role_tag") == "role" else "conversations"
    source.rename(columns.get("messages", "conversations"), known)
    source.settings["format"] = "messages" if known == "messages" else "sharegpt"
    _convert_context(source, columns)
    check_key(source, "tags.role_tag", tags.get("role_tag"), ROLE_KEYS)
    check_key(source, "tags.content_tag", tags.get("content_tag"), CONTENT_KEYS)
    for tag, role in _ROLE_TAGS.items():
        check_speaker(source, f"tags.{tag}", tags.get(tag), role)


def _convert_context(source: SourceConversion, columns: dict[str, Any]) -> None:
    for column in ("system", "tools"):
        source.rename(columns.get(column), column)
