"""Examples of a transform for turns alongside a request, typed items, and turns in columns."""

from __future__ import annotations

import copy
from typing import Any

from sftprep.records.inspection.record_paths import (
    Part,
    Path,
    choose_text,
    find_texts,
    iter_values,
    join_names,
    part_of,
    shorten,
    to_expression,
    words_of,
)
from sftprep.records.keys.pair_keys import find_pair
from sftprep.records.messages import read_messages
from sftprep.records.options import InvalidRecord, Record, RecordOptions
from sftprep.records.roles import SYSTEM_ROLES, to_role

EDIT = "# EDIT:"
"""The start of a comment at a place to edit."""

_CALL, _RESULT = "function_call", "function_call_output"
"""Types of the items of the Responses API that are not messages."""


def roles_of(value: Any, options: RecordOptions) -> set[str]:
    """Return the roles of turns; none if they cannot be read.

    A system that speaks after the user, and instead of the assistant, is a speaker whose role
    is not known, as in task-oriented dialogues.
    """
    try:
        messages = read_messages(copy.deepcopy(value), "messages", options)
    except (InvalidRecord, RecursionError):
        return set()
    roles = [message["role"] for message in messages]
    if "assistant" not in roles and any(role in SYSTEM_ROLES for role in roles[1:]):
        return set()
    return {*roles}


def find_history(record: Record, options: RecordOptions) -> tuple[str, Path, Path | None] | None:
    """Return the key of earlier turns and the paths of the answer and the request after them.

    They are earlier turns if the record has another answer, and a request or a key named "history".
    """
    for key, value in record.items():
        if not isinstance(value, list) or "assistant" not in roles_of(value, options):
            continue
        texts = [t for t in find_texts(record) if len(t.path) == 1 and t.path[0] != key]
        answer, has_answer = choose_text(texts, "answer", None)
        request, has_request = choose_text(texts, "request", answer)
        is_named = "history" in words_of(key)
        if answer is None or not has_answer or not (has_request or is_named):
            continue
        is_text = request is not None and request.part != "metadata"
        return key, answer.path, request.path if request and is_text else None
    return None


def history_lines(key: str, answer: Path, request: Path | None) -> list[str]:
    """Return the lines of an example for earlier turns, a request and an answer."""
    content = to_expression(request) if request else '"..."'
    note = "" if request else f"  {EDIT} write the request here"
    return [
        'return {"messages": [',
        f"    *{to_expression((key,))},",
        f'    {{"role": "user", "content": {content}}},{note}',
        f'    {{"role": "assistant", "content": {to_expression(answer)}}},',
        "]}",
    ]


def find_task(record: Record, options: RecordOptions) -> tuple[str, Path] | None:
    """Return the key of turns, and the path of an instruction or a context for all of them.

    A text that is one of the turns, such as the first request, is neither. A list of texts is more
    likely one of contexts or of answers than one of turns.
    """
    for key, value in record.items():
        is_list = isinstance(value, list) and all(isinstance(item, dict) for item in value)
        if not is_list or "assistant" not in roles_of(value, options):
            continue
        turns = {inner for _, inner in iter_values({key: value}) if isinstance(inner, str)}
        for text in find_texts(record):
            is_other = text.path[0] != key and text.value not in turns
            if len(text.path) == 1 and is_other and text.part in ("request", "context"):
                return key, text.path
    return None


def task_lines(record: Record, key: str, task: Path) -> list[str]:
    """Return the lines of an example for turns with an instruction or a context.

    Pairs become a conversation each, and turns are one.
    """
    pairs = {find_pair(item) if isinstance(item, dict) else None for item in record[key]}
    pair = pairs.pop()
    instruction, turns = to_expression(task), to_expression((key,))
    if pair is None or pairs:
        note = f"{EDIT} is this the system prompt?"
        return [
            'return {"messages": [',
            f'    {{"role": "system", "content": {instruction}}},  {note}',
            f"    *{turns},",
            "]}",
        ]
    request, answer = pair
    content = f'"\\n\\n".join(filter(None, [{instruction}, item[{request!r}]]))'
    return [
        "return [",
        '    {"messages": [',
        f'        {{"role": "user", "content": {content}}},',
        f'        {{"role": "assistant", "content": item[{answer!r}]}},',
        "    ]}",
        f"    for item in {turns}",
        "]",
    ]


def find_items(record: Record, options: RecordOptions) -> Path | None:
    """Return the path of items of the Responses API: messages, calls and their results."""
    for path, value in iter_values(record):
        if isinstance(value, list) and value and all(map(_is_item, value)):
            types = {item.get("type") for item in value}
            if types & {_CALL, _RESULT} and any(item.get("role") for item in value):
                return path
    return None


def _is_item(item: Any) -> bool:
    if not isinstance(item, dict):
        return False
    keys = {_CALL: ("name", "arguments"), _RESULT: ("output",)}.get(str(item.get("type")))
    if keys is not None:
        return all(isinstance(item.get(key), str) for key in keys)
    return to_role(item.get("role")) is not None and "content" in item


def item_lines(path: Path) -> list[str]:
    """Return the lines of an example for items of the Responses API."""
    function = '{"name": item["name"], "arguments": item["arguments"]}'
    call = f'{{"type": "function", "id": item.get("call_id"), "function": {function}}}'
    result = '{"role": "tool", "content": item["output"]}'
    return [
        "messages = []",
        f"for item in {to_expression(path)}:",
        f'    if item.get("type") == "{_CALL}":',
        f"        call = {call}",
        '        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})',
        f'    elif item.get("type") == "{_RESULT}":',
        f"        messages.append({result})",
        "    else:  # an item without a role or a content raises KeyError, and is counted",
        '        messages.append({"role": item["role"], "content": item["content"]})',
        'return {"messages": messages}',
    ]


def find_columns(record: Record) -> tuple[Path, str, str] | None:
    """Return the path of turns in columns, with the keys of their roles and their texts."""
    for path, value in iter_values(record):
        if not isinstance(value, dict):
            continue
        columns = {k: v for k, v in value.items() if isinstance(v, list) and len(v) > 1}
        texts = [k for k, v in columns.items() if all(isinstance(item, str) for item in v)]
        roles = next((k for k in texts if all(map(to_role, columns[k]))), None)
        others = [k for k in texts if k != roles and len(columns[k]) == len(columns[roles or k])]
        if roles is not None and others:
            return path, roles, others[0]
    return None


def column_lines(columns: Record, path: Path, roles: str, contents: str) -> list[str]:
    """Return the lines of an example for turns in columns.

    Args:
        columns: The columns.
        path: Their path.
        roles: The key of the roles.
        contents: The key of the texts.
    """
    turns = to_expression(path)
    lengths = {len(column) if isinstance(column, list) else -1 for column in columns.values()}
    if len(columns) > 2 and lengths == {len(columns[roles])}:  # with calls, for example
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        if roles_of(rows, RecordOptions()):
            return [
                f"turns = {turns}",
                "rows = zip(*turns.values(), strict=True)",
                'return {"messages": [dict(zip(turns, row, strict=True)) for row in rows]}',
            ]
    return [
        f"turns = {turns}",
        'return {"messages": [',
        '    {"role": role, "content": content}',
        f"    for role, content in zip(turns[{roles!r}], turns[{contents!r}], strict=True)",
        "]}",
    ]


def pair_turns(keys: list[str], loop: str, is_named: bool) -> list[str]:
    """Return the lines for turns with a request and an answer each, or none."""
    parts: dict[str, Part | None] = {key: part_of((key,)) for key in keys}
    request = next((key for key, part in parts.items() if part == "request"), None)
    answer = next((key for key, part in parts.items() if part == "answer"), None)
    others = [key for key, part in parts.items() if part is None and key != request]
    if request is None or not (answer or (is_named and others)):
        return []
    note = "" if answer else f"  {EDIT} is this the answer?"
    answer = answer or others[-1]
    reasoning = next((key for key, part in parts.items() if part == "reasoning"), None)
    content = f'"content": turn[{answer!r}]'
    if reasoning:
        content += f', "reasoning_content": turn[{reasoning!r}]'
    unused = [key for key in keys if key not in (request, answer, reasoning)]
    return [
        f"for turn in {loop}:"
        + (f"  # not used: {join_names(map(shorten, unused))}" if unused else ""),
        f'    messages.append({{"role": "user", "content": turn[{request!r}]}})',
        f'    messages.append({{"role": "assistant", {content}}}){note}',
        'return {"messages": messages}',
    ]


def speaker_turns(keys: list[str], turns: list[Record], loop: str, is_named: bool) -> list[str]:
    """Return the lines for turns with a speaker and a text each, or none."""
    speakers = {key: list(dict.fromkeys(turn[key] for turn in turns)) for key in keys}
    speaker = next((k for k, names in speakers.items() if len(names) == 2), None)
    texts = [key for key in keys if key != speaker]
    if not is_named or speaker is None or not texts:
        return []
    content = max(texts, key=lambda key: sum(len(turn[key]) for turn in turns))
    names = speakers[speaker]
    known = [to_role(name) for name in names]
    is_certain = set(known) == {"user", "assistant"}
    is_reversed = known[0] == "assistant" or known[1] == "user"
    found = ("assistant", "user") if is_reversed else ("user", "assistant")
    roles = dict(zip(names, found, strict=True))
    note = "" if is_certain else f"  {EDIT} who is the assistant?"
    return [
        f"roles = {roles!r}{note}",
        f"for turn in {loop}:",
        f"    role = roles[turn[{speaker!r}]]",
        f'    messages.append({{"role": role, "content": turn[{content!r}]}})',
        'return {"messages": messages}',
    ]
