"""Images of records: detection, and removal on request.

They are detected so that no image is lost without notice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from sftprep.core.json_values import iter_leaves
from sftprep.records.keys.content_names import is_content, is_text
from sftprep.records.keys.pair_keys import find_pair
from sftprep.records.options import Record, load_json
from sftprep.records.roles import PASSED_ROLES, TOOL_CALL, to_role
from sftprep.records.tool_calls import is_call
from sftprep.sources.readers.to_jsonl import OPAQUE

IMAGE_KEYS = frozenset({"images", "image"})
"""Keys of a record under which images are stored."""

_PART_TYPES = frozenset({"image", "image_url", "input_image", "image_file"})
_PART_KEYS = frozenset({"image", "image_url", "inlineData", "inline_data", "fileData", "file_data"})
_IMAGE_DATA = frozenset(
    {*("type", "image", "image_url", "url", "path", "bytes", "data", "file", "file_name")}
)
"""Keys of an image whose values are no text."""
_TEXT_KEYS = frozenset({"text", "value", "content"})
_NAMES = re.compile("image|inline_?data|file_?data", re.IGNORECASE)
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
    return any(iter_leaves(value)) if isinstance(value, dict | list) else bool(value)


def remove_images(record: Record, conversation_keys: frozenset[str]) -> bool:
    """Remove the images of a record, and their placeholders in its texts.

    The calls of a record and the objects that its tools return are data, which may have a key
    "image": they are left as they are. Text alongside an image, such as its caption, is kept: as
    the text of the part, or under its key, where it is counted unless it is read.

    Args:
        record: The record, which is changed in place.
        conversation_keys: The keys of conversations, which may be JSON text.

    Returns:
        Whether it had any. Without images, nothing is changed: `<image>` may be text about HTML.
    """
    has_images = False
    while (key := image_key(record)) is not None:
        _keep_texts(record.pop(key), record)
        has_images = True
    for key in conversation_keys.intersection(record):
        text = record[key]
        if isinstance(text, str) and text.lstrip().startswith("[") and _NAMES.search(text):
            with suppress(ValueError, RecursionError):  # it is rejected where it is read
                record[key] = load_json(text, f'"{key}"')
    # All of them, so not `any` of a generator, which stops at the first one.
    removed = [_remove_from(holder) for holder in _find_holders(record)]
    if not any(removed) and not has_images:
        return False
    for holder in [record, *_find_holders(record)]:
        _remove_placeholders(holder)
    return True


def _remove_from(holder: Any) -> bool:
    """Remove the image parts from a list, or the keys with images from an object."""
    if isinstance(holder, dict):
        keys = [key for key in IMAGE_KEYS if is_filled(holder.get(key))]
        for key in keys:
            _keep_texts(holder.pop(key), holder)
        return bool(keys)
    kept, num_images = [], 0
    for item in holder:
        if not is_image_part(item):
            kept.append(item)
            continue
        num_images += 1
        texts: dict[str, Any] = {}
        _keep_texts(item, texts)
        if texts:
            kept.append({"text": "", **texts, "type": "text"})
    holder[:] = kept
    return num_images > 0


def _keep_texts(image: Any, holder: dict[str, Any]) -> None:
    """Add the texts alongside an image to an object, under their keys.

    Example:
        image = {"path": "dog.png", "caption": "A small dog."}  ->  {"caption": "A small dog."}
    """
    stack = [image]
    while stack:
        item = stack.pop()
        if isinstance(item, list):
            stack.extend(reversed(item))
        if not isinstance(item, dict):
            continue
        for key, value in item.items():
            if isinstance(value, dict | list):
                stack.append(value)
            elif _is_text_of_image(key, value):
                earlier = holder.get(key)
                has_text = isinstance(earlier, str) and earlier
                holder[key] = f"{earlier}\n{value}" if has_text else value


def _is_text_of_image(key: str, value: Any) -> bool:
    if not isinstance(value, str) or key in _IMAGE_DATA or not value.strip():
        return False
    return key in _TEXT_KEYS or is_content(key, value) or is_text(value)


def _remove_placeholders(holder: Any) -> None:
    """Remove the placeholders from the strings in a list or an object."""
    if isinstance(holder, list):
        holder[:] = [_PLACEHOLDER.sub("", v) if isinstance(v, str) else v for v in holder]
        return
    # The answer of a record with tools may be JSON text of calls.
    may_be_json = bool(holder.get("tools")) or _role_of(holder) in _RESULT_ROLES
    for key, value in holder.items():
        if not isinstance(value, str) or key in _NOT_CONTENT:
            continue
        if not (may_be_json and _is_json_of_objects(value)):
            holder[key] = _PLACEHOLDER.sub("", value)


# --- the parts of a record that may have images ---------------------------------------------------

_NOT_CONTENT = frozenset(
    {*("tools", "functions", "chat_template_kwargs"), *("tool_calls", "function_call")}
)
"""Keys of a record or a turn with tools and calls, which contain no images."""
_SPEAKER_KEYS = frozenset({"role", "from", "speaker", "author"})
_CONTENT_KEYS = frozenset({"content", "value", "text", "parts", "message"})
_CALL_TYPES = ("tool_call", "tool_use", "function_call", "functionCall")
_RESULT_TYPES = ("tool_result", "functionResponse", "function_response")
_RESULT_KEYS = ("content", "response", "output")
_TEXT_TYPES = ("text", "input_text", "output_text", "reasoning", "thinking")
_RESULT_ROLES = ("tool", *PASSED_ROLES)


def _find_holders(record: Record) -> Iterator[Any]:
    """Yield the lists and objects of a record that may have images or placeholders.

    They are its turns, the contents of these, and the parts of contents.
    """
    for key, value in record.items():
        if key not in _NOT_CONTENT:
            yield from _walk(value, in_result=False)


def _walk(value: Any, *, in_result: bool) -> Iterator[Any]:
    """Yield a list or an object, and those in it.

    Args:
        value: Turns, a turn, the content of a turn, or a part of it.
        in_result: Whether the value is the content of a tool.
    """
    if isinstance(value, list):
        yield value
        for item in value:
            # The objects in a result are parts, or what the tool returns.
            if not in_result or not isinstance(item, dict) or item.get("type") in _TEXT_TYPES:
                yield from _walk(item, in_result=in_result)
        return
    if not isinstance(value, dict) or _is_call_or_turn_of_calls(value):
        return
    result = value if value.get("type") in _RESULT_TYPES else None
    result = next((value[kind] for kind in _RESULT_TYPES if value.get(kind)), result)
    if result is not None:
        contents = [result.get(key) for key in _RESULT_KEYS] if isinstance(result, dict) else []
        for content in contents:
            if isinstance(content, list):
                yield from _walk(content, in_result=True)
        return
    yield value
    is_result = _role_of(value) in _RESULT_ROLES
    for key, item in value.items():
        if key not in _NOT_CONTENT and (
            isinstance(item, list)
            or (isinstance(item, dict) and key in _CONTENT_KEYS and not is_result)
        ):
            yield from _walk(item, in_result=in_result or is_result)


def _role_of(turn: dict[str, Any]) -> str | None:
    """Return the role of a turn, under any key of its speaker."""
    names = (turn.get(key) for key in ("role", "from", "speaker", "author", "type"))
    return next((role for role in map(to_role, names) if role is not None), None)


def _is_call_or_turn_of_calls(value: dict[str, Any]) -> bool:
    if _role_of(value) == TOOL_CALL:
        return True
    if not _SPEAKER_KEYS.isdisjoint(value) or find_pair(value) is not None:
        return False
    return (
        value.get("type") in _CALL_TYPES
        or any(isinstance(value.get(kind), dict) for kind in _CALL_TYPES)
        or is_call(value)
    )


def _is_json_of_objects(text: str) -> bool:
    try:
        value = json.loads(text) if text.lstrip().startswith(("{", "[")) else None
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) or (isinstance(value, list) and dict in map(type, value))
