"""Compare the check for omissions with sentinels that transformers renders.

    python -m benchmarks.conservation
    python -m benchmarks.conservation --tokenizers FOLDER    # also the templates of its tokenizers
    python -m benchmarks.conservation --records FOLDER    # also the conversations of JSONL files

For each chat template of the package trl (and of the tokenizers in a folder), and each feature of a
conversation (a system message, reasoning of an earlier turn, text alongside a call, two calls,
tools, the name of a speaker, ...), transformers renders the conversation with a unique string in
place of every content. What its text lacks are the omissions of the template. The check of
`sftprep` then judges the same conversation as sftprep renders it, with five kinds of contents:
those strings; long texts that need escapes; strings of a few characters; the same string
everywhere; strings that templates write by themselves. The benchmark counts, by kind, the omissions
that the check missed and its false alarms.

With files of records, each conversation is rendered by one of the templates in turn, and judged in
the same way.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from sftprep.chat_template.compiler.compilation import RenderedPieces
from sftprep.chat_template.reference.rendering import REASONING_KEYS
from sftprep.chat_template.template import ChatTemplate, Rendered
from sftprep.core.omissions import (
    ARGUMENT,
    CALL,
    MESSAGE,
    NAME,
    OMISSION_KINDS,
    REASONING,
    TEXT_WITH_CALL,
    TOOLS,
)
from sftprep.errors import SftprepError, TemplateError
from sftprep.render.omissions.check import ConservationCheck, Conversation
from sftprep.render.omissions.written_contents import WrittenContents

SPECIAL_TOKENS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
}
STYLES = ("sentinels", "long", "short", "same", "structure")

_STRUCTURE = (
    *("assistant", "You are a helpful assistant.", "tool_call", "description", "commentary"),
    *("Cutting Knowledge Date", "arguments", "parameters", "functions", "look_up"),
)
"""Strings that chat templates write by themselves."""

MessagesAndTools = tuple[list[dict[str, Any]], list[Any] | None]
Value = Callable[..., Any]


@dataclass
class Contents:
    """The contents of one conversation, in the order in which they are created."""

    style: str
    kinds: list[str] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)

    def __call__(self, kind: str, *, number: bool = False, is_prose: bool = False) -> Any:
        """Return the next content. is_prose: whether that of a tool or call is not a name."""
        position = len(self.values)
        value: Any
        if number:
            value = {"short": position + 3, "same": 5}.get(self.style, 777_000_100 + position)
        elif self.style == "sentinels":
            value = f"sentinel{position:03d}value"
        elif kind in (CALL, TOOLS) and not is_prose:
            # Templates may refuse a name that is not an identifier.
            names = {"short": "get", "same": "look_up", "structure": "function"}
            value = names.get(self.style, f"fetch_all_{position}")
        elif self.style == "long":
            value = f'Part {position} says <b>"hi"</b> & it\'s naïve: {position * 7919}'
        elif self.style == "short":
            words = ("Oslo", "yes", "no", "7", "ok", "go", "red", "tea", "cat", "dog")
            value = words[position % len(words)]
        elif self.style == "structure":
            value = _STRUCTURE[position % len(_STRUCTURE)]
        else:
            value = "Yes, of course it is"
        self.kinds.append(kind)
        self.values.append(value)
        return value


def user(new: Value) -> dict[str, Any]:
    """Return a user's message."""
    return {"role": "user", "content": new(MESSAGE)}


def answer(new: Value, **keys: Any) -> dict[str, Any]:
    """Return an assistant's message."""
    return {"role": "assistant", "content": new(MESSAGE), **keys}


def features() -> dict[str, Callable[[Value], MessagesAndTools]]:
    """Return the conversation with each feature, by name."""
    table: dict[str, Callable[[Value], MessagesAndTools]] = {
        "one turn": lambda new: ([user(new), answer(new)], None),
        "two turns": lambda new: ([user(new), answer(new), user(new), answer(new)], None),
        "system": lambda new: (
            [{"role": "system", "content": new(MESSAGE)}, user(new), answer(new)],
            None,
        ),
        "developer": lambda new: (
            [{"role": "developer", "content": new(MESSAGE)}, user(new), answer(new)],
            None,
        ),
        "speaker": lambda new: ([{**user(new), "name": new(NAME)}, answer(new)], None),
        "tools": lambda new: ([user(new), answer(new)], [_tool(new, _parameters)]),
        "described parameters": lambda new: (
            [user(new), answer(new)],
            [_tool(new, _described_parameters)],
        ),
        "nested parameters": lambda new: (
            [user(new), answer(new)],
            [_tool(new, _nested_parameters)],
        ),
        "numbers of parameters": lambda new: (
            [user(new), answer(new)],
            [_tool(new, _numeric_parameters)],
        ),
        "flat parameters": lambda new: ([user(new), answer(new)], [_tool(new, _flat_parameters)]),
        "a call repeats a parameter": _with_call_of_tool,
        "a result with another name": _with_other_name,
        "think tags": lambda new: ([user(new), _thinking(new)], None),
        "think tags, earlier turn": lambda new: (
            [user(new), _thinking(new), user(new), answer(new)],
            None,
        ),
    }
    for key in REASONING_KEYS:
        table[key] = lambda new, key=key: ([user(new), _reasoned(new, key)], None)
        table[f"{key}, earlier turn"] = lambda new, key=key: (
            [user(new), _reasoned(new, key), user(new), answer(new)],
            None,
        )
    for name, encode in (("values", lambda value: value), ("JSON text", json.dumps)):
        table[f"call, {name}"] = lambda new, encode=encode: _with_call(new, encode, text=False)
        table[f"text with call, {name}"] = lambda new, encode=encode: _with_call(
            new, encode, text=True
        )
        table[f"two calls, {name}"] = lambda new, encode=encode: _with_two_calls(new, encode)
    return table


def _reasoned(new: Value, key: str) -> dict[str, Any]:
    reasoning = new(REASONING)
    return answer(new, **{key: reasoning})


def _thinking(new: Value) -> dict[str, Any]:
    reasoning, text = new(REASONING), new(MESSAGE)
    return {"role": "assistant", "content": f"<think>\n{reasoning}\n</think>\n\n{text}"}


def _tool(new: Value, make_parameters: Value) -> dict[str, Any]:
    function = {
        "name": new(TOOLS),
        "description": new(TOOLS, is_prose=True),
        "parameters": make_parameters(new),
    }
    return {"type": "function", "function": function}


def _parameters(new: Value) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {new(TOOLS): {"type": "string"}},
        "required": ["city"],
    }


def _described_parameters(new: Value) -> dict[str, Any]:
    return {"type": "object", "properties": {new(TOOLS): _choice(new)}}


def _nested_parameters(new: Value) -> dict[str, Any]:
    place = {
        "description": new(TOOLS, is_prose=True),
        "type": "object",
        "properties": {new(TOOLS): _choice(new)},
    }
    return {"type": "object", "properties": {new(TOOLS): place}, "required": []}


def _numeric_parameters(new: Value) -> dict[str, Any]:
    choice = {
        "type": "integer",
        "enum": [new(TOOLS, number=True), new(TOOLS, number=True)],
        "default": new(TOOLS, number=True),
    }
    return {"type": "object", "properties": {new(TOOLS): choice}}


def _flat_parameters(new: Value) -> dict[str, Any]:
    return {new(TOOLS): {"type": "str", "description": new(TOOLS, is_prose=True)}}


def _choice(new: Value) -> dict[str, Any]:
    return {
        "type": "string",
        "description": new(TOOLS, is_prose=True),
        "enum": [new(TOOLS), new(TOOLS)],
        "default": new(TOOLS),
    }


def _with_call_of_tool(new: Value) -> MessagesAndTools:
    messages, _ = _with_call(new, lambda value: value, text=False)
    tool = _tool(new, lambda new: {"city": {"type": "str", "description": new(TOOLS)}})
    return messages, [tool]


def _call(new: Value, encode: Callable[[Any], Any], arguments: Callable[[], Any], key: str) -> Any:
    name = new(CALL)
    return {
        "id": key,
        "type": "function",
        "function": {"name": name, "arguments": encode(arguments())},
    }


def _result(new: Value, call: dict[str, Any]) -> dict[str, Any]:
    name = call["function"]["name"]
    return {"role": "tool", "content": new(MESSAGE), "tool_call_id": call["id"], "name": name}


def _with_other_name(new: Value) -> MessagesAndTools:
    messages, _ = _with_call(new, lambda value: value, text=False)
    messages[2]["name"] = f"{new(NAME)}_other"  # it never equals the name of the call
    return messages, None


def _with_call(new: Value, encode: Callable[[Any], Any], *, text: bool) -> MessagesAndTools:
    question = user(new)
    content = new(TEXT_WITH_CALL) if text else ""
    call = _call(new, encode, lambda: {"city": new(ARGUMENT)}, "abcdefgh1")
    turn = {"role": "assistant", "content": content, "tool_calls": [call]}
    return [question, turn, _result(new, call), answer(new)], None


def _with_two_calls(new: Value, encode: Callable[[Any], Any]) -> MessagesAndTools:
    question = user(new)
    first = _call(
        new, encode, lambda: {"city": new(ARGUMENT), "n": new(ARGUMENT, number=True)}, "abcdefgh1"
    )
    second = _call(
        new, encode, lambda: {"all": [new(ARGUMENT), {"deep": new(ARGUMENT)}]}, "abcdefgh2"
    )
    turn = {"role": "assistant", "content": "", "tool_calls": [first, second]}
    results = [_result(new, first), _result(new, second)]
    return [question, turn, *results, answer(new)], None


@dataclass
class Outcome:
    """Cases judged, those with an omission, and the differences by kind."""

    cases: int = 0
    with_omissions: int = 0
    missed: Counter[str] = field(default_factory=Counter)
    false_alarms: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)

    def add(self, case: str, found: frozenset[str], expected: frozenset[str]) -> None:
        """Add a case, with the omissions that the check found and those of transformers."""
        self.cases += 1
        self.with_omissions += bool(expected)
        self.missed.update(expected - found)
        self.false_alarms.update(found - expected)
        if found != expected:
            self.differences.append(f"{case}: {sorted(found)}, not {sorted(expected)}")


class Check(NamedTuple):
    """The two steps of the check for one template."""

    written: WrittenContents
    conservation: ConservationCheck


def make_check(source: str) -> Check:
    """Return the check for a template."""
    template = ChatTemplate(source, variables=SPECIAL_TOKENS)

    def render(conversation: Conversation) -> str:
        messages, tools, variables = conversation
        return template.render(messages, tools=tools, template_kwargs=variables).text

    def render_pieces(messages: list[dict[str, Any]]) -> Sequence[str]:
        try:
            rendering = template.render_pieces(messages)
        except TemplateError:
            return ()
        return rendering.pieces if isinstance(rendering, RenderedPieces) else ()

    return Check(WrittenContents(render_pieces), ConservationCheck(render, source))


def found_by(
    check: Check,
    messages: list[dict[str, Any]],
    tools: list[Any] | None,
    rendering: RenderedPieces | Rendered,
    template: ChatTemplate,
) -> frozenset[str]:
    """Return the kinds of omissions that the check finds in the last render of a template."""
    pieces = rendering.pieces if isinstance(rendering, RenderedPieces) else ()
    is_bare = max(map(len, messages), default=0) <= 2
    if tools is None and is_bare and check.written.has_all(messages, pieces):
        return frozenset()
    return check.conservation.find_omissions(
        Conversation(messages, tools), rendering.text, pieces, template.written_as_json
    ).kinds


def compare(templates: dict[str, str]) -> Outcome:
    """Judge every feature with every template."""
    outcome = Outcome()
    for template_name, source in sorted(templates.items()):
        template = ChatTemplate(source, variables=SPECIAL_TOKENS)
        check = make_check(source)
        for feature, make in features().items():
            expected = omitted_by_transformers(source, make)
            if expected is None:
                continue
            for style in STYLES:
                # Parsers make each string an object of its own.
                messages, tools = json.loads(json.dumps(make(Contents(style))))
                try:
                    rendering = template.render_pieces(messages, tools)
                except SftprepError:
                    continue
                found = found_by(check, messages, tools, rendering, template)
                outcome.add(f"{template_name}, {feature}, {style}", found, expected)
    return outcome


def omitted_by_transformers(
    source: str, make: Callable[[Value], MessagesAndTools]
) -> frozenset[str] | None:
    """Return the kinds of content that transformers' rendering lacks; None if it is refused."""
    contents = Contents("sentinels")
    messages, tools = make(contents)
    calls = accumulate(kind == CALL for kind in contents.kinds)
    sentinels = [*zip(contents.kinds, contents.values, calls, strict=True)]
    return _omitted_kinds(source, messages, tools, sentinels)


def _omitted_kinds(
    source: str,
    messages: list[dict[str, Any]],
    tools: list[Any] | None,
    sentinels: list[tuple[str, Any, int]],
) -> frozenset[str] | None:
    """Return the kinds of the sentinels (kind, value, number of the call) that transformers does
    not write; None if the template refuses the conversation."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, _ = render_jinja_template(
            [messages], tools=tools, chat_template=source, **SPECIAL_TOKENS
        )
    except Exception:  # templates raise whatever they want
        return None
    hidden = [item for item in sentinels if str(item[1]) not in texts[0]]
    omitted_calls = {call for kind, _, call in hidden if kind == CALL}
    return frozenset(
        kind for kind, _, call in hidden if kind != ARGUMENT or call not in omitted_calls
    )


# --- records --------------------------------------------------------------------------------------


def compare_records(templates: dict[str, str], conversations: list[MessagesAndTools]) -> Outcome:
    """Judge each conversation with one of the templates, in turn."""
    outcome = Outcome()
    names = sorted(templates)
    judges = {
        name: (ChatTemplate(source, variables=SPECIAL_TOKENS), make_check(source))
        for name, source in templates.items()
    }
    for number, (messages, tools) in enumerate(conversations):
        name = names[number % len(names)]
        template, check = judges[name]
        record = Record()
        expected = _omitted_kinds(
            templates[name],
            [record.message(message) for message in messages],
            [record.tool(tool) for tool in tools] if tools else None,
            record.sentinels,
        )
        if expected is None:
            continue
        try:
            rendering = template.render_pieces(messages, tools)
        except SftprepError:
            continue
        outcome.add(
            f"{name}, record {number + 1}",
            found_by(check, messages, tools, rendering, template),
            expected,
        )
    return outcome


@dataclass
class Record:
    """A copy of a record whose contents are sentinels, made apart from the code of the check."""

    sentinels: list[tuple[str, Any, int]] = field(default_factory=list)
    calls: int = 0
    names: dict[Any, Any] = field(default_factory=dict)  # the sentinel of each name of a call

    def new(self, kind: str, value: Any) -> Any:
        """Return a sentinel for a value; what is not searched for stays as it is."""
        number = len(self.sentinels)
        sentinel: Any
        if isinstance(value, str) and value.strip():
            sentinel = f"sentinel{number:05d}value"
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            sentinel = 777_000_000 + number
        else:
            return value
        self.sentinels.append((kind, sentinel, self.calls))
        return sentinel

    def message(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return the copy of a message."""
        copied = dict(message)
        calls = [call for call in message.get("tool_calls") or () if isinstance(call, dict)]
        for key in REASONING_KEYS:
            if key in message:
                copied[key] = self.new(REASONING, message[key])
        kind = TEXT_WITH_CALL if calls else MESSAGE
        content = message.get("content")
        if message["role"] == "assistant" and isinstance(content, str) and "</think>" in content:
            before, _, after = content.partition("</think>")
            opening, tag, thought = before.rpartition("<think>")
            is_line = before.endswith("\n") and after.startswith("\n")
            kind_before = REASONING if tag or is_line else kind
            reasoning, answer = self.new(kind_before, thought), self.new(kind, after)
            copied["content"] = f"{opening}{tag}\n{reasoning}\n</think>\n\n{answer}"
        elif isinstance(content, str):
            copied["content"] = self.new(kind, content)
        if message["role"] in ("user", "assistant", "system") and "name" in message:
            copied["name"] = self.new(NAME, message["name"])
        elif "name" in message:  # of a result: that of its call
            copied["name"] = self.names.get(message["name"], message["name"])
        if calls:
            copied["tool_calls"] = [self.call(call) for call in calls]
        return copied

    def call(self, call: dict[str, Any]) -> dict[str, Any]:
        """Return the copy of a call."""
        self.calls += 1
        function = dict(call.get("function", call))
        name = function.get("name")
        function["name"] = self.names[name] = self.new(CALL, name)
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            function["arguments"] = json.dumps(self.values(json.loads(arguments)))
        else:
            function["arguments"] = self.values(arguments)
        return {**call, "function": function} if "function" in call else function

    def values(self, value: Any) -> Any:
        """Return the copy of the arguments of a call."""
        if isinstance(value, dict):
            return {key: self.values(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.values(item) for item in value]
        return self.new(ARGUMENT, value)

    def tool(self, tool: dict[str, Any]) -> dict[str, Any]:
        """Return the copy of a tool whose parameters are a JSON schema."""
        function = dict(tool.get("function", tool))
        for key in ("name", "description"):
            if key in function:
                function[key] = self.tool_string(function[key])
        if isinstance(function.get("parameters"), dict):
            function["parameters"] = self.schema(function["parameters"])
        return {**tool, "function": function} if "function" in tool else function

    def schema(self, schema: dict[str, Any]) -> dict[str, Any]:
        """Return the copy of a JSON schema, with other names, descriptions and values."""
        copied = dict(schema)
        names: dict[str, str] = {}
        for key, value in schema.items():
            if key == "properties":
                names = {name: self.tool_string(name) for name in value}
                copied[key] = {names[name]: self.schema(inner) for name, inner in value.items()}
            elif key in ("description", "default", "enum"):
                items = value if isinstance(value, list) else [value]
                new_items = [self.tool_value(item) for item in items]
                copied[key] = new_items if isinstance(value, list) else new_items[0]
            elif isinstance(value, dict):
                copied[key] = self.schema(value)
        if "required" in schema:
            copied["required"] = [names.get(name, name) for name in schema["required"]]
        return copied

    def tool_value(self, value: Any) -> Any:
        """Return a sentinel for a description or a possible value of a parameter."""
        return self.tool_string(value) if isinstance(value, str) else self.new(TOOLS, value)

    def tool_string(self, value: str) -> str:
        """Return a sentinel that is as long as a string, since templates cut long types."""
        if not value.strip() or value in ("type", "description", "properties", "items", "format"):
            return value
        sentinel = f"q{len(self.sentinels)}k".ljust(len(value), "k")
        self.sentinels.append((TOOLS, sentinel, self.calls))
        return sentinel


def read_conversations(folder: Path) -> list[MessagesAndTools]:
    """Return the conversations of the JSONL files in a folder, as `sftprep build` reads them."""
    from sftprep.records.formats import detect_format, record_reader
    from sftprep.records.options import InvalidRecord, RecordOptions

    options = RecordOptions()
    found: list[MessagesAndTools] = []
    for path in sorted(folder.glob("*.jsonl")):
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        name = detect_format(json.loads(lines[0]), options) if lines else None
        if name is None or name == "tokens":
            continue
        read = record_reader(name, options)
        for number, line in enumerate(lines):
            try:
                example = read(json.loads(line), number)
            except InvalidRecord:
                continue
            messages = example.messages or []
            if messages and all(isinstance(m.get("content") or "", str) for m in messages):
                found.append((messages, example.tools))
    return found


def templates_of_trl() -> dict[str, str]:
    """Return the chat templates of the package trl, by name."""
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    return {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.jinja")}


def templates_of_tokenizers(folder: Path) -> dict[str, str]:
    """Return the chat templates of the tokenizers in a folder, by name."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*/chat_template.jinja")):
        found[f"{path.parent.name} (tokenizer)"] = path.read_text(encoding="utf-8")
    for path in sorted(folder.glob("*/tokenizer_config.json")):
        template = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
        if isinstance(template, str):
            found.setdefault(f"{path.parent.name} (tokenizer)", template)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizers", type=Path, help="a folder with tokenizers")
    parser.add_argument("--records", type=Path, help="a folder with JSONL files")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    templates = templates_of_trl()
    if arguments.tokenizers:
        templates |= templates_of_tokenizers(arguments.tokenizers)
    outcomes = {"features": compare(templates)}
    if arguments.records:
        outcomes["records"] = compare_records(templates, read_conversations(arguments.records))
    if arguments.json:
        print(json.dumps({name: to_json(outcome) for name, outcome in outcomes.items()}))
        return
    for name, outcome in outcomes.items():
        print(
            f"{name}: {len(templates)} templates, {outcome.cases:,} cases,"
            f" {outcome.with_omissions:,} with an omission"
        )
        print(f"{'':<28}{'missed':>8}{'false alarms':>14}")
        for kind in OMISSION_KINDS:
            print(f"{kind:<28}{outcome.missed[kind]:>8}{outcome.false_alarms[kind]:>14}")
        for line in outcome.differences[:20]:
            print(line)


def to_json(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome as JSON values."""
    kinds = {
        kind: {"missed": outcome.missed[kind], "false alarms": outcome.false_alarms[kind]}
        for kind in OMISSION_KINDS
    }
    return {"cases": outcome.cases, "with a loss": outcome.with_omissions, "kinds": kinds}


if __name__ == "__main__":
    main()
