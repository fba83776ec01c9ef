"""An example of a transform for records of unknown format, chosen by their keys and values.

1. Each kind of record has a function in `_EXAMPLES` that returns the example, or None if the record
   is of another kind. The first one that returns an example is used.
2. The example is valid Python and runs on the record. Where the record does not show for certain
   what belongs where, the line ends with a comment that starts with `EDIT`.
3. Comments list the keys of the record, and those that the example does not use.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sftprep.records.inspection.record_paths import (
    Path,
    Text,
    choose_text,
    describe_type,
    find_choices,
    find_context,
    find_texts,
    iter_values,
    join_names,
    part_of,
    shorten,
    to_expression,
    words_of,
)
from sftprep.records.inspection.turn_examples import (
    EDIT,
    column_lines,
    find_columns,
    find_history,
    find_items,
    find_task,
    history_lines,
    item_lines,
    pair_turns,
    roles_of,
    speaker_turns,
    task_lines,
)
from sftprep.records.options import Record, RecordOptions, opaque_kind
from sftprep.records.roles import ROLES, to_role

CONVERSATION_WORDS = {"data", "dialog", "dialogue", "conversation", "chat", "utterances"}
_WORDS_OF_TURNS = CONVERSATION_WORDS | {
    *("dialogs", "dialogues", "conversations", "chats", "turns", "messages"),
}
_PLACEHOLDER = '"..."'
_MARKED_ROLES = {
    **{role.replace("_", " "): name for role, name in ROLES.items()},
    **{"instruction": "user", "question": "user", "input": "user", "q": "user"},
    **{"response": "assistant", "answer": "assistant", "output": "assistant", "a": "assistant"},
}
"""The role of each speaker that a text may name before a colon."""
_MARK = re.compile(
    r"(?:^|(?<=\s))(?:#{1,4} ?)?("
    + "|".join(sorted(map(re.escape, _MARKED_ROLES), key=len, reverse=True))
    + r") ?:",
    re.IGNORECASE,
)
_END_MARKS = ("<|endoftext|>", "<|im_end|>", "</s>", "<|eot_id|>")


@dataclass(frozen=True, slots=True)
class _Example:
    """The lines of an example below `def`, the paths that they use, and lines above `def`."""

    lines: list[str]
    paths: list[Path]
    imports: tuple[str, ...] = ()


def transform_example(record: Record, options: RecordOptions) -> str:
    """Return the source text of a function `to_chat` for a record.

    Args:
        record: The record, before keys are renamed.
        options: The options with which it was read.
    """
    examples = (make(record, options) for make in _EXAMPLES)
    example = next(example for example in examples if example is not None)
    used = {path[0] for path in example.paths}
    unused = [key for key in record if key not in used and record[key] not in (None, "", [], {})]
    described = [f"{shorten(key)} ({describe_type(value)})" for key, value in record.items()]
    comments = [f"# the keys of the first record: {join_names(described)}"]
    if unused:
        comments.append(f"# not used: {join_names(map(shorten, unused))}")
    lines = [*example.imports, *comments, "def to_chat(record):"]
    return "\n".join([*lines, *(f"    {line}" for line in example.lines)])


def _message(role: str, content: str, note: str = "", reasoning: str = "") -> str:
    """Return the line for a message in a list, with a comment if it has a place to edit."""
    key = f', "reasoning_content": {reasoning}' if reasoning else ""
    line = f'    {{"role": "{role}", "content": {content}{key}}},'
    return f"{line}  {EDIT} {note}" if note else line


def _system_line(texts: list[Text], except_in: Path = ()) -> tuple[list[str], list[Path]]:
    """Return the line and the path of the system prompt, or nothing without one."""
    for text in texts:
        if text.part == "system" and len(text.path) == 1 and text.path != except_in[:1]:
            expression = to_expression(text.path)
            if mark := re.match(r"system: *", text.value, re.IGNORECASE):
                expression += f".removeprefix({mark[0]!r})"
            return [_message("system", expression)], [text.path]
    return [], []


def _note_lists(record: Record, path: Path) -> str:
    """Return the note about a text in a list with further elements; "" if there are none."""
    value: Any = record
    for key in path:
        if isinstance(value, list) and len(value) > 1:
            return f"this is only the first of {len(value)}"
        value = value[key]
    return ""


def _value_at(record: Record, path: Path) -> Any:
    value: Any = record
    for key in path:
        value = value[key]
    return value


def _ask(part: str, text: Text | None) -> str:
    """Return the note about a text whose keys do not say what it is."""
    return f"is this the {part}?" if text else f"write the {part} here"


def _note_opaque(record: Record, part: str) -> str:
    """Return the note about a column that holds a part as bytes or images; "" without one."""
    for key, value in record.items():
        kind = opaque_kind(value)
        if kind is not None and part_of((key,)) == part:
            return f"{shorten(key)} holds {kind}, not text; write the {part} here"
    return ""


def _message_list(lines: list[str]) -> list[str]:
    """Return the lines for a list of messages to which others are added."""
    return ["messages = [", *lines, "]"] if lines else ["messages = []"]


# --- the kinds of records -------------------------------------------------------------------------


def _from_history(record: Record, options: RecordOptions) -> _Example | None:
    """Return the example for earlier turns alongside a request and its answer."""
    found = find_history(record, options)
    if found is None:
        return None
    key, answer, request = found
    system, used = _system_line(find_texts(record))
    head, *lines = history_lines(*found)
    return _Example(
        [head, *system, *lines], [(key,), answer, *([request] if request else []), *used]
    )


def _from_task(record: Record, options: RecordOptions) -> _Example | None:
    """Return the example for turns with an instruction or a context for all of them."""
    found = find_task(record, options)
    if found is None:
        return None
    return _Example(task_lines(record, *found), [(found[0],), found[1]])


def _from_items(record: Record, options: RecordOptions) -> _Example | None:
    """Return the example for typed items, some of which are messages."""
    path = find_items(record, options)
    return None if path is None else _Example(item_lines(path), [path])


def _from_columns(record: Record, options: RecordOptions) -> _Example | None:
    """Return the example for turns in columns."""
    found = find_columns(record)
    if found is None:
        return None
    return _Example(column_lines(_value_at(record, found[0]), *found), [found[0]])


def _from_nested_messages(record: Record, options: RecordOptions) -> _Example | None:
    """Return the example for messages in an inner value, with or without the answer."""
    lists: list[tuple[Path, set[str]]] = []
    answer: Path | None = None  # a single message of the assistant
    for path, value in iter_values(record):
        if isinstance(value, list) and value and isinstance(value[0], dict):
            roles = roles_of(value, options)
            if "user" in roles:
                lists.append((path, roles))
        elif (
            isinstance(value, dict)
            and to_role(value.get("role")) == "assistant"
            and isinstance(value.get("content"), str)
        ):
            answer = answer or path
    for path, roles in lists:
        if "assistant" in roles:
            return _Example([f'return {{"messages": {to_expression(path)}}}'], [path])
    if not lists:
        return None
    path = lists[0][0]
    if answer is not None and answer[: len(path)] != path:
        messages = f"[*{to_expression(path)}, {to_expression(answer)}]"
        return _Example([f'return {{"messages": {messages}}}'], [path, answer])
    texts = [text for text in find_texts(record) if text.path[0] != path[0]]
    text, is_certain = choose_text(texts, "answer", None)
    expression = to_expression(text.path) if text else _PLACEHOLDER
    note = _note_lists(record, text.path) if is_certain and text else _ask("answer", text)
    lines = [
        'return {"messages": [',
        f"    *{to_expression(path)},",
        _message("assistant", expression, note),
        "]}",
    ]
    return _Example(lines, [path, *([text.path] if text else [])])


def _from_turns(record: Record, options: RecordOptions) -> _Example | None:
    """Return the example for turns in a list, or in a dictionary, with the same keys."""
    for path, value in iter_values(record):
        items = value.values() if isinstance(value, dict) else value
        if not isinstance(value, (dict, list)) or not items:
            continue
        if not all(isinstance(item, dict) for item in items):
            continue
        turns = [*items]
        keys = [key for key in turns[0] if all(isinstance(turn.get(key), str) for turn in turns)]
        loop = to_expression(path) + (".values()" if isinstance(value, dict) else "")
        is_named = bool(words_of(str(path[-1])) & _WORDS_OF_TURNS)
        lines = pair_turns(keys, loop, is_named) or speaker_turns(keys, turns, loop, is_named)
        if lines:
            system, used = _system_line(find_texts(record), path)
            lines = [*_message_list(system), *lines]
            return _Example(lines, [path, *used])
    return None


def _from_marked_text(record: Record, options: RecordOptions) -> _Example | None:
    """Return the example for a conversation in one text, in which marks name the speakers."""
    texts = find_texts(record)
    for text in texts:
        roles = find_marks(text.value)
        if not {"user", "assistant"} <= set(roles.values()):
            continue
        names = "|".join(sorted(roles, key=len, reverse=True))
        marks = _MARK.finditer(text.value)
        starts = [mark.start() for mark in marks if mark[1] in roles]
        at_line_starts = all(not text.value[:k].rsplit("\n", 1)[-1].strip() for k in starts)
        start = r"(?:^|\n)\s*" if at_line_starts else r"(?:^|\s)\s*"
        expression = to_expression(text.path)
        for mark in _END_MARKS:
            if mark in text.value:
                expression += f".replace({mark!r}, '')"
        system, used = _system_line(texts, text.path)
        if not system and text.value[: starts[0]].strip():
            system = [_message("system", "parts[0].strip()")]
        append = '    messages.append({"role": roles[name], "content": text.strip()})'
        answer_lines, paths = _missing_answer(record, text, append)
        return _Example(
            [
                f"parts = re.split(r'{start}(?:#+ ?)?({names}) ?:', {expression})",
                f"roles = {roles!r}",
                *_message_list(system),
                "for name, text in zip(parts[1::2], parts[2::2]):",
                *(answer_lines or [append]),
                'return {"messages": messages}',
            ],
            [text.path, *used, *paths],
            ("import re", ""),
        )
    return None


def _missing_answer(record: Record, text: Text, append: str) -> tuple[list[str], list[Path]]:
    """Return the lines for a text that ends with the mark of the answer, and their paths.

    The answer is another text of the record. If the text does not end so, there are none.
    """
    mark = list(_MARK.finditer(text.value))[-1]
    if text.value[mark.end() :].strip() or _MARKED_ROLES[mark[1].lower()] != "assistant":
        return [], []
    others = [other for other in find_texts(record) if other.path[0] != text.path[0]]
    answer, is_certain = choose_text(others, "answer", None)
    reply = to_expression(answer.path) if answer else _PLACEHOLDER
    note = (_note_lists(record, answer.path) if answer and is_certain else "") or _ask(
        "answer", answer
    )
    last = f'messages.append({{"role": "assistant", "content": {reply}}})  {EDIT} {note}'
    lines = ["    if text.strip():", f"    {append}", last]
    return lines, [answer.path] if answer else []


def find_marks(text: str) -> dict[str, str]:
    """Return the role of each mark of a speaker in a text, by the spelling of the mark.

    Of the words before a colon within a line, only those with a capital are marks.
    """
    found: dict[str, str] = {}
    for mark in _MARK.finditer(text):
        is_start = not text[: mark.start()].rsplit("\n", 1)[-1].strip()
        if is_start or mark[1][0].isupper():
            found[mark[1]] = _MARKED_ROLES[mark[1].lower()]
    return found


def _from_texts(record: Record, options: RecordOptions) -> _Example:
    """Return the example for a request and an answer anywhere in the record."""
    texts = find_texts(record)
    request, has_request = choose_text(texts, "request", None)
    answer, has_answer = choose_text(texts, "answer", request)
    if not has_request and has_answer:
        request, has_request = choose_text(texts, "request", answer)
    content = to_expression(request.path) if request else _PLACEHOLDER
    if request and has_request:
        request_note = _note_lists(record, request.path)
    else:
        request_note = _note_opaque(record, "request") or _ask("request", request)
    paths = [text.path for text in (request, answer) if text]
    context = next((t for t in texts if t.part == "context" and t not in (request, answer)), None)
    input_key = find_context(record, request, answer)
    if context:
        content = f'{to_expression(context.path)} + "\\n\\n" + {content}'
        paths.append(context.path)
        request_note = request_note or _note_lists(record, context.path)
    elif input_key is not None and request is not None:
        content += f' + "\\n" + {to_expression((input_key,))}'
        paths.append((input_key,))
    choices = find_choices(record)
    if choices:
        shown = to_expression(choices)
        if isinstance(_value_at(record, choices), dict):
            shown = f'f"{{key}}. {{text}}" for key, text in {shown}.items()'
        content += f' + "\\n" + "\\n".join({shown})'
        paths.append(choices)
    reply, note = _answer_expression(record, answer if has_answer else None, choices, paths)
    if not reply:
        # Another text is not the answer if the record has a key for it, which is empty here.
        if any(part_of((key,)) == "answer" for key in record):
            paths = [path for path in paths if answer is None or path != answer.path]
            answer = None
        reply = to_expression(answer.path) if answer else _PLACEHOLDER
        note = _note_opaque(record, "answer") or _ask("answer", answer)
    system, used = _system_line(texts)
    reasoning = next((t for t in texts if t.part == "reasoning" and len(t.path) == 1), None)
    thought = to_expression(reasoning.path) if reasoning and reasoning is not answer else ""
    paths += [*used, *([reasoning.path] if reasoning and thought else [])]
    lines = [
        'return {"messages": [',
        *(system if not used or used[0] not in paths[:2] else []),
        _message("user", content, request_note),
        _message("assistant", reply, note, thought),
        "]}",
    ]
    return _Example(lines, paths)


def _answer_expression(
    record: Record, answer: Text | None, choices: Path | None, paths: list[Path]
) -> tuple[str, str]:
    """Return the expression of an answer whose keys are certain, and a note; "" if none is.

    The answer may be the index of a choice, or a number.
    """
    of_choices: Any = None if choices is None else _value_at(record, choices)
    if answer is not None:
        expression = to_expression(answer.path)
        if choices is not None and isinstance(of_choices, dict) and answer.value in of_choices:
            return f"{to_expression(choices)}[{expression}]", ""
        return expression, _note_lists(record, answer.path)
    for path, value in iter_values(record):
        if type(value) not in (int, float) or part_of(path) != "answer" or len(path) > 2:
            continue
        paths.append(path)
        expression = to_expression(path)
        is_index = type(value) is int and isinstance(of_choices, list)
        if choices is not None and is_index and 0 <= value < len(of_choices):
            return f"{to_expression(choices)}[{expression}]", ""
        return f"str({expression})", ""
    return "", ""


_EXAMPLES: tuple[Callable[[Record, RecordOptions], _Example | None], ...] = (
    _from_history,
    _from_task,
    _from_items,
    _from_nested_messages,
    _from_columns,
    _from_turns,
    _from_marked_text,
    _from_texts,
)
"""The kinds of records, in the order in which they are tried; the last one takes every record."""
