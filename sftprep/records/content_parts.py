"""Content in the form of a list of parts.

The parts are texts, reasoning, tool calls and their results.

The spellings are those of OpenAI, Anthropic, Bedrock, Gemini, Hugging Face and TRL.
"""

from __future__ import annotations

import json
from typing import Any

from sftprep.core.types import Message
from sftprep.records.images import is_image_part
from sftprep.records.options import InvalidRecord, RecordOptions, require_string
from sftprep.records.tool_calls import parse_calls

_TEXT_TYPES = (None, "text", "input_text", "output_text")
_REASONING_TYPES = ("reasoning", "thinking", "reasoningContent")
_CALL_TYPES = ("tool_call", "tool_use", "function_call", "functionCall", "toolUse")
_RESULT_TYPES = ("tool_result", "functionResponse", "function_response", "toolResult")
_KEYS_AS_TYPES = ("functionCall", "functionResponse", "toolUse", "toolResult", "reasoningContent")
"""Types of parts that are the only key of the part: those of Gemini and Bedrock."""
_KEYS_OF_CALL_IDS = ("tool_use_id", "tool_call_id", "toolUseId")
_TEXT_KEYS = ("text", "value", "content", "reasoning", "thinking")


def from_parts(
    message: Message, parts: list[Any], where: str, options: RecordOptions
) -> list[Message]:
    """Convert a message with a list of parts as its content.

    Parts of text are joined. Parts with reasoning or tool calls become keys of the message, and
    results of tools become messages of their own, as templates expect them.

    Args:
        message: The message.
        parts: Its content.
        where: The position of the message, for errors.
        options: What the template can show.

    Raises:
        InvalidRecord: A part is not valid, or the template cannot show it: it would be missing
            without notice.

    Example:
        [{"type": "text", "text": "a"}, {"type": "tool_use", "name": "f", "input": {}}]  ->
            content "a" and tool_calls [{"type": "function", "function": {"name": "f", ...}}]
    """
    texts: list[str] = []
    added: Message = {}  # reasoning and calls
    results: list[Message] = []
    for item in parts:
        part = item if isinstance(item, dict) else {"type": "text", "text": item}
        kind = _kind_of(part)
        if kind in _TEXT_TYPES:
            texts.append(_part_text(part, where))
        elif kind in _REASONING_TYPES:  # counted when rendered if the template does not show it
            earlier = added.get("reasoning_content") or message.get("reasoning_content") or ""
            added["reasoning_content"] = earlier + _part_text(part, where)
        elif kind in _CALL_TYPES and options.tool_calls:
            calls = _parse_call_part(part, kind, where)
            earlier_calls = added.get("tool_calls") or message.get("tool_calls") or ()
            added["tool_calls"] = [*earlier_calls, *calls]
        elif kind in _RESULT_TYPES:
            results.append(_to_result(part, kind, where, options))
        else:
            raise _unsupported(part, kind, where)
    whole = {**message, "content": "".join(texts), **added}
    # A message of the user that only carries results has nothing else to show.
    return [*results, whole] if texts or added or not results else results


def _kind_of(part: dict[str, Any]) -> Any:
    """Return the type of a part; parts of Gemini and Bedrock have a key instead of a type."""
    kind = part.get("type")
    if kind is None:
        kind = next((key for key in _KEYS_AS_TYPES if part.get(key)), None)
    return "thinking" if kind in _TEXT_TYPES and part.get("thought") is True else kind


def _part_text(part: dict[str, Any], where: str) -> str:
    kind = part.get("type", "text")
    reasoning = part.get("reasoningContent")
    if isinstance(reasoning, dict):  # {"reasoningText": {"text": ..., "signature": ...}}
        inner = reasoning.get("reasoningText")
        return _part_text(inner if isinstance(inner, dict) else reasoning, where)
    keys = [key for key in _TEXT_KEYS if key in part]
    if keys:
        # An empty text does not hide one under another key.
        key = next((key for key in keys if part[key]), keys[0])
        return require_string(part[key], f"a {kind} part of {where}")
    if is_image_part(part):
        raise _unsupported(part, "image", where)
    other = next((key for key in part if part[key] and key not in ("type", "thought")), None)
    if other is not None and part.get("type") is None:  # the key is the type of a part of Gemini
        what = f"{where} has a content part with the key {other!r}"
        raise InvalidRecord("unsupported_part", f"{what}, which the chat template cannot show")
    raise InvalidRecord("bad_row", f"a {kind} part of {where} has no text")


def _parse_call_part(part: dict[str, Any], kind: str, where: str) -> list[dict[str, Any]]:
    what = f"a tool call part of {where}"
    inner = part.get(kind)
    if isinstance(inner, dict):
        return parse_calls({"id": inner.get("toolUseId"), **inner}, what)
    if "name" not in part and "function" not in part:
        return parse_calls(_part_text(part, where), what)
    return parse_calls(part, what)


def _to_result(part: dict[str, Any], kind: str, where: str, options: RecordOptions) -> Message:
    """Return the message of a tool for the result in a part."""
    inner = part[kind] if isinstance(part.get(kind), dict) else part
    content = next((inner[key] for key in ("content", "response", "output") if key in inner), "")
    message: Message = {"role": "tool"}
    if isinstance(inner.get("name"), str):
        message["name"] = inner["name"]
    call = next((inner[key] for key in _KEYS_OF_CALL_IDS if key in inner), None)
    if isinstance(call, str):
        message["tool_call_id"] = call
    if isinstance(content, list):
        parts = [_from_json_part(item) for item in content]
        (message,) = from_parts(message, parts, f"the result in {where}", options)
    else:
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        message["content"] = text
    return message


def _from_json_part(part: Any) -> Any:
    """Return a part of a result with its text, if it is an object in a part of Bedrock."""
    if isinstance(part, dict) and part.keys() == {"json"}:
        return {"text": json.dumps(part["json"], ensure_ascii=False)}
    return part


def _unsupported(part: dict[str, Any], kind: Any, where: str) -> InvalidRecord:
    return InvalidRecord(
        "images" if is_image_part(part) else "unsupported_part",
        f"{where} has a content part of type {kind!r}, which the chat template cannot show",
    )
