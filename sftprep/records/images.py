"""Images of records: detection, and removal on request.

They are detected so that no image is lost without notice.
"""

from __future__ import annotations

import re
from typing import Any

from sftprep.records.options import Record
from sftprep.sources.readers.to_jsonl import OPAQUE

IMAGE_KEYS = frozenset({"images", "image"})
"""Keys of a record under which images are stored."""

_PART_TYPES = frozenset({"image", "image_url", "input_image", "image_file"})
_PART_KEYS = frozenset({"image", "image_url", "inlineData", "inline_data", "fileData", "file_data"})
_PLACEHOLDER = re.compile(r"<image[ _]?\d*>\n|\n?<image[ _]?\d*>")


def is_image_part(part: Any) -> bool:
    """Return whether a part of a content is an image."""
    if type(part) is not dict:
        return False
    kind = part.get("type")
    if isinstance(kind, str):
        return kind in _PART_TYPES
    return len(part) == 1 and not _PART_KEYS.isdisjoint(part)


def image_key(record: Record) -> str | None:
    """Return a key of a record with images, or None.

    Null, "" and empty lists are not images. A column of a table in which `datasets` stores images
    counts under any name.
    """
    if dict in map(type, record.values()):
        for key, value in record.items():
            if type(value) is dict and "image" in str(value.get(OPAQUE, "")).lower():
                return key
    if IMAGE_KEYS.isdisjoint(record):
        return None
    return next((key for key in IMAGE_KEYS if is_filled(record.get(key))), None)


def is_filled(value: Any) -> bool:
    """Return whether a value has content.

    Null, "", and lists and objects of these have none.
    """
    if isinstance(value, dict):
        value = [*value.values()]
    return any(map(is_filled, value)) if isinstance(value, list) else bool(value)


def remove_images(record: Record) -> bool:
    """Remove the images of a record, and their placeholders in its texts.

    Returns:
        Whether it had any. Without images, nothing is changed: `<image>` may be text about HTML.
    """
    has_images = False
    while (key := image_key(record)) is not None:
        del record[key]
        has_images = True
    contents = {key: value for key, value in record.items() if key not in ("tools", "functions")}
    # All of them, so not `any` of a generator, which stops at the first one.
    removed = list(map(_remove_parts, contents.values()))
    if not any(removed) and not has_images:
        return False
    record.update({key: _without_placeholders(value) for key, value in contents.items()})
    return True


def _remove_parts(value: Any) -> bool:
    """Remove the images of messages, and image parts from the lists in a value."""
    if isinstance(value, dict):
        keys = [key for key in IMAGE_KEYS if key in value and is_filled(value[key])]
        for key in keys:
            del value[key]
        return any(list(map(_remove_parts, value.values()))) or bool(keys)
    if not isinstance(value, list):
        return False
    kept = [item for item in value if not is_image_part(item)]
    is_shorter = len(kept) < len(value)
    value[:] = kept
    return any(list(map(_remove_parts, kept))) or is_shorter


def _without_placeholders(value: Any) -> Any:
    if isinstance(value, str):
        return _PLACEHOLDER.sub("", value)
    if isinstance(value, list):
        return [_without_placeholders(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_placeholders(item) for key, item in value.items()}
    return value
