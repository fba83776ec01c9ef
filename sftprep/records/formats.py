"""The formats of records: detection and reading.

A new format is a function and a line in FORMATS, and its name in `FormatName` if the setting
`format` accepts it. A new pair of keys is a line in `PAIRS` (keys/pair_keys.py); layouts of turns
are in messages.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sftprep.core.types import Example
from sftprep.records.conversations import (
    CHAT_KEYS,
    TURN_KEYS,
    apply_chat_settings,
    conversation_reader,
)
from sftprep.records.images import IMAGE_KEYS, image_key, remove_images
from sftprep.records.keys.pair_keys import PAIRS
from sftprep.records.options import (
    InvalidRecord,
    Record,
    RecordOptions,
    rename_keys,
    require_string,
)
from sftprep.records.pairs import PAIR_KEYS, from_prompt_completion, pair_reader
from sftprep.records.pretokenized import from_tokens

Kind = Literal["tokens", "prompt", "conversation", "pair", "text"]
"""What a record of a format consists of. A prompt and its completion are strings or messages, and a
pair is a conversation if there is a chat template."""


@dataclass(frozen=True, slots=True)
class Format:
    """A format of records.

    Attributes:
        kind: What a record consists of.
        keys: The keys that identify the format: a record that has them all is of this format.
        convert: Returns the example of a record with its line number, or raises InvalidRecord.
        optional: The other keys that it reads.
        fits: Whether the value of a key may be of this format, for keys that other records use for
            something else; None: the keys are sufficient.
    """

    kind: Kind
    keys: frozenset[str]
    convert: Callable[[Record, int, RecordOptions], Example]
    optional: frozenset[str] = frozenset()
    fits: Callable[[Any], bool] | None = None


def record_reader(format_name: str, options: RecordOptions) -> Callable[[Record, int], Example]:
    """Return a function from a record and its line number to an Example.

    The Example shares parts of the record, which must not be used afterwards. The function raises
    InvalidRecord; its reason is `other_schema` if the keys are those of another format.
    """
    keys, convert = keys_of(format_name, options), FORMATS[format_name].convert
    is_text, num_keys = FORMATS[format_name].kind != "tokens", len(keys)
    has_settings = options.system is not None or options.template_kwargs is not None

    def read(record: Record, line: int) -> Example:
        replaced: Record = {}
        if options.renames:
            record = rename_keys(record, options.renames, replaced)
        # A record without other keys has no column of images; images to drop may be in its turns.
        may_have_images = is_text and (len(record) > num_keys or options.drop_images)
        had_images = may_have_images and _check_images(record, options)
        for key in keys:
            if record.get(key) is None:
                example = _read_other_key(record, line, format_name, options)
                break
        else:
            example = convert(record, line, options)
        if has_settings and example.messages is not None:
            apply_chat_settings(example, options)
        if had_images:
            example.images_dropped = True
        if replaced:
            example.replaced = replaced
        return example

    return read


def read_record(record: Record, line: int, format_name: str, options: RecordOptions) -> Example:
    """Return the Example of a single record; see `record_reader`."""
    return record_reader(format_name, options)(record, line)


def keys_of(format_name: str, options: RecordOptions) -> frozenset[str]:
    """Return the keys of a format for its detection, after keys were renamed."""
    return frozenset({options.text_field}) if format_name == "text" else FORMATS[format_name].keys


def detect_format(record: Record, options: RecordOptions) -> str | None:
    """Return the first format in FORMATS with all of its keys in the record, or None.

    A key whose value is null is absent. No format has turns in columns, so a transform is needed.
    """
    if options.renames:
        record = rename_keys(dict(record), options.renames)
    for name, kind in FORMATS.items():
        values = [record.get(key) for key in keys_of(name, options)]
        if None not in values and (kind.fits is None or all(map(kind.fits, values))):
            has_columns = kind.kind == "conversation" and isinstance(values[0], dict)
            return None if has_columns else name
    return None


def keys_read(options: RecordOptions) -> frozenset[str]:
    """Return the keys of all formats together.

    Readers of tables skip all other columns.
    """
    known = frozenset(key for kind in FORMATS.values() for key in kind.keys | kind.optional)
    renamed = {source for source, _ in options.renames}
    return known | IMAGE_KEYS | {options.text_field} | renamed


def is_turn(value: Any) -> bool:
    """Return whether a value is a string, or a list starting with a message."""
    return isinstance(value, str) or (
        isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)
    )


def _is_conversation(value: Any) -> bool:
    """Return whether a value is a list, or JSON text of one."""
    return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("["))


def _check_images(record: Record, options: RecordOptions) -> bool:
    """Remove the images of a record if requested, and return whether it had any.

    Raises:
        InvalidRecord: It has images, which would be missing without notice.
    """
    if options.drop_images:
        return remove_images(record, _CONVERSATION_KEYS)
    key = image_key(record)
    if key is not None:
        raise InvalidRecord("images", f'"{key}" holds an image, and only text is read')
    return False


def _read_other_key(record: Record, line: int, format_name: str, options: RecordOptions) -> Example:
    """Read a conversation under the key of another layout, or raise InvalidRecord.

    In tables that were merged, each row has null under the keys of the other table.
    """
    (*_, key) = sorted(keys_of(format_name, options))
    other_format = detect_format(record, RecordOptions(text_field=options.text_field))
    if (
        key in record
        and other_format is not None
        and FORMATS[format_name].kind == FORMATS[other_format].kind == "conversation"
    ):
        return FORMATS[other_format].convert(record, line, options)
    raise _missing_keys(record, format_name, other_format, options)


def _missing_keys(
    record: Record, format_name: str, other_format: str | None, options: RecordOptions
) -> InvalidRecord:
    absent = sorted(key for key in keys_of(format_name, options) if record.get(key) is None)
    names = ", ".join(f'"{key}"' for key in absent)
    what = "null" if all(key in record for key in absent) else "missing"
    if other_format is not None and other_format != format_name:
        return InvalidRecord(
            "other_schema",
            f"a record of format {other_format} among those of format {format_name}:"
            f" {names} is {what}",
        )
    if what == "missing" and format_name == "text" and record.keys() == {"text"}:
        return InvalidRecord(
            "other_text_field",
            f'{names} is missing: the only key is "text", as for the lines of text files, because'
            " they have no keys",
        )
    return InvalidRecord(
        "bad_row",
        f"{names} is null"
        if what == "null"
        else f"{names} is missing from this record of format {format_name}",
    )


# --- the formats ----------------------------------------------------------------------------------


def from_text(record: Record, line: int, options: RecordOptions) -> Example:
    """Return the example of plain text for language modelling."""
    return Example(line, text=require_string(record[options.text_field], f'"{options.text_field}"'))


_TOKEN_KEYS = frozenset(
    {
        "labels",
        "completion_mask",
        "assistant_masks",
        "attention_mask",
        "position_ids",
        "seq_lengths",
    }
)


def _conversation(key: str, fits: Callable[[Any], bool] | None = None) -> Format:
    return Format("conversation", frozenset({key}), conversation_reader(key), TURN_KEYS, fits)


def _pair(request: str, answer: str, fits: Callable[[Any], bool] | None = None) -> Format:
    keys = frozenset({request, answer})
    return Format("pair", keys, pair_reader(request, answer), PAIR_KEYS, fits)


FORMATS: dict[str, Format] = {
    "tokens": Format("tokens", frozenset({"input_ids"}), from_tokens, _TOKEN_KEYS),
    "prompt-completion": Format(
        "prompt", frozenset({"prompt", "completion"}), from_prompt_completion, CHAT_KEYS
    ),
    "messages": _conversation("messages"),
    "sharegpt": _conversation("conversations"),
    "conversation": _conversation("conversation", _is_conversation),
    "dialog": _conversation("dialog", _is_conversation),
    "dialogue": _conversation("dialogue", _is_conversation),
    "gemini": _conversation("contents", _is_conversation),
    "alpaca": _pair("instruction", "output"),
    "text": Format("text", frozenset({"text"}), from_text),
    **{f"{pair[0]}/{pair[1]}": _pair(*pair, is_turn) for pair in PAIRS[1:]},
}
"""The formats by name, in the order in which they are detected. Pairs of keys come last: a record
that has a text as well is trained on that text."""

_CONVERSATION_KEYS = frozenset(
    key for kind in FORMATS.values() if kind.kind == "conversation" for key in kind.keys
)
