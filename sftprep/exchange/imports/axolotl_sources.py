"""Conversion of one entry of axolotl's `datasets:`."""

from __future__ import annotations

import os
import re
from typing import Any, get_args

from sftprep.config.validation import TrainEnd, TrainRole
from sftprep.exchange.imports.converted import Conversion, SourceConversion
from sftprep.exchange.imports.turns import CONTENT_KEYS, ROLE_KEYS, check_key, check_speaker
from sftprep.records.switches import SWITCH_KEYS

_LOADERS = ("json", "parquet", "csv", "arrow", "text")
"""Values of `path` that are kinds of files of `datasets`; `data_files` names the files."""
_READ = {
    *("path", "data_files", "ds_type", "name", "split", "revision", "type"),
    *("field_messages", "field_tools", "field_system", "field_thinking", "field"),
    *("message_property_mappings", "message_field_role", "message_field_content"),
    *("message_field_training", "roles", "roles_to_train", "train_on_eos", "chat_template"),
}
"""Settings that are converted, or noted with a reason of their own."""
_END_REASON = "the end token of each trained turn is trained, as with turn"


def convert_source(
    name: str, entry: Any, content: dict[str, Any], conversion: Conversion
) -> list[dict[str, Any]]:
    """Convert a data set to sources: none if a build cannot read it, and one for each subset.

    Args:
        name: Its name for notes, such as `datasets[0]`.
        entry: Its settings.
        content: The settings of the whole file.
        conversion: Where notes go.
    """
    source = SourceConversion(name, conversion)
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        conversion.skip(name, entry, "it has no path; the data set is left out")
        return []
    if not _convert_type(source, entry, content):
        return []
    _convert_location(source, entry)
    source.skip_rest(entry, _READ)
    subsets = entry.get("name")
    if subsets is None:
        return [source.settings]
    names = subsets if isinstance(subsets, list) else [subsets]
    return [{**source.settings, "config_name": subset} for subset in names]


# --- where the data is ----------------------------------------------------------------------------


def _convert_location(source: SourceConversion, entry: dict[str, Any]) -> None:
    path, files, settings = entry["path"], entry.get("data_files"), source.settings
    if isinstance(files, str):
        files = [files]
    is_local = os.path.exists(path) or path.startswith((".", "/", "~")) or "://" in path
    if not files:
        settings["path"] = path
    elif path in _LOADERS or is_local:
        settings["inputs"] = files
    else:
        settings["inputs"] = [f"hf://datasets/{path}/{file}" for file in files]
    kind, names = entry.get("ds_type"), files or [path]
    if kind and not all(re.search(rf"\.{re.escape(str(kind))}l?(\.\w+)?$", n) for n in names):
        source.skip("ds_type", kind, "the kind of a file follows from its name")
    if entry.get("revision"):
        settings["revision"] = entry["revision"]
    split = entry.get("split")
    if split is None:
        return
    match = re.fullmatch(r"(\w+)(?:\[:(\d+)\])?", split)
    if match is None:
        source.skip("split", split, "use split: NAME and limit: NUMBER")
        return
    # The split of local files of which none has the name of a split is always train.
    settings["split"] = match[1]
    if match[2]:
        settings["limit"] = int(match[2])


# --- what the records are, and what is trained ----------------------------------------------------


def _convert_type(source: SourceConversion, entry: dict[str, Any], content: dict[str, Any]) -> bool:
    """Convert the type of the records; return whether a build can read them."""
    kind, settings = entry.get("type"), source.settings
    trains_all = bool(content.get("train_on_inputs"))
    if kind is None:
        settings["format"] = "tokens"
    elif isinstance(kind, dict):
        _convert_own_type(source, kind)
        settings["train_on"] = "all" if trains_all else "completion"
    elif kind == "chat_template" or kind.startswith("sharegpt"):
        settings["train_on"] = "all" if trains_all else "assistant"
        _convert_conversation(source, entry)
    elif kind == "completion":
        settings |= {"format": "text", "train_on": "all"}
        if entry.get("field"):
            settings["text_field"] = entry["field"]
    elif kind == "alpaca":
        # Without a template, an instruction has the text layout of Alpaca, as in axolotl.
        settings |= {"format": "alpaca", "as_chat": False}
        settings["train_on"] = "all" if trains_all else "completion"
    else:
        source.skip("type", kind, "the data set is left out; use a transform (docs/formats.md)")
        return False
    return True


def _convert_own_type(source: SourceConversion, kind: dict[str, Any]) -> None:
    """Convert a type that names the fields of an instruction, its input and its output."""
    for field, known in (
        ("field_instruction", "instruction"),
        ("field_input", "input"),
        ("field_output", "output"),
        ("field_system", "system"),
    ):
        source.rename(kind.get(field), known)
    source.settings |= {"format": "alpaca", "as_chat": False}
    for field in ("format", "no_input_format", "system_prompt", "system_format"):
        if kind.get(field):
            source.skip(f"type.{field}", kind[field], "the text layout of Alpaca is used")


def _convert_conversation(source: SourceConversion, entry: dict[str, Any]) -> None:
    mappings = {
        "role": entry.get("message_field_role"),
        "content": entry.get("message_field_content"),
        **(entry.get("message_property_mappings") or {}),
    }
    messages = entry.get("field_messages", "messages")
    if messages != "conversations":
        source.rename(messages, "messages")
    source.rename(entry.get("field_tools"), "tools")
    source.rename(entry.get("field_system"), "system")
    for name, key in mappings.items():
        read = {"role": ROLE_KEYS, "content": CONTENT_KEYS}.get(name, (name,))
        check_key(source, f"message_property_mappings.{name}", key, read)
    thinking = entry.get("field_thinking")
    if thinking and thinking != "reasoning_content":
        source.skip("field_thinking", thinking, "rename it with a transform")
    switch = entry.get("message_field_training")
    if switch and switch not in SWITCH_KEYS:
        source.skip("message_field_training", switch, "rename it to training with a transform")
    _convert_roles(source, entry)
    template = entry.get("chat_template")
    if template not in (None, "tokenizer_default"):
        source.skip("chat_template", template, "the whole build has one template")


def _convert_roles(source: SourceConversion, entry: dict[str, Any]) -> None:
    roles = {"human": "user", "gpt": "assistant"}
    for role, speakers in (entry.get("roles") or {}).items():
        for speaker in speakers:
            roles[speaker] = role
            check_speaker(source, f"roles.{role}", speaker, role)
    trained = entry.get("roles_to_train", ["assistant"])
    chosen = list(dict.fromkeys(roles.get(role, role) for role in trained or ()))
    if not chosen or not set(chosen) <= set(get_args(TrainRole)):
        source.skip("roles_to_train", trained, "the turns of the assistant are trained")
    elif chosen != ["assistant"] and source.settings["train_on"] != "all":
        source.settings["train_roles"] = chosen
    end = entry.get("train_on_eos")
    if end in get_args(TrainEnd) and source.settings["train_on"] != "all":
        if end != "turn":
            source.settings["train_end"] = end
    elif end is not None:
        source.skip("train_on_eos", end, _END_REASON)
