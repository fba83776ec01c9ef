"""Compare the check for lost content with sentinels that transformers renders.

    python -m benchmarks.conservation
    python -m benchmarks.conservation --tokenizers FOLDER    # also the templates of its tokenizers

For each chat template of the package trl (and of the tokenizers in a folder), and each feature of a
conversation (a system message, reasoning of an earlier turn, text alongside a call, two calls,
tools, the name of a speaker, ...), transformers renders the conversation with a unique string in
place of every content. What its text lacks is what the template loses. The check of `sftprep` then
judges the same conversation as sftprep renders it, with four kinds of contents: those strings; long
texts that need escapes; strings of a few characters; the same string everywhere. The benchmark
counts, by kind of loss, the losses that the check missed and its false alarms.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sftprep.chat_template.reference.rendering import REASONING_KEYS
from sftprep.chat_template.template import ChatTemplate
from sftprep.errors import SftprepError
from sftprep.render.conservation import ConservationCheck
from sftprep.render.content_leaves import (
    ARGUMENT,
    CALL,
    LOSSES,
    MESSAGE,
    NAME,
    REASONING,
    TEXT_WITH_CALL,
    TOOLS,
)

SPECIAL_TOKENS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
}
STYLES = ("sentinels", "long", "short", "same")

Conversation = tuple[list[dict[str, Any]], list[Any] | None]
Value = Callable[..., Any]


@dataclass
class Contents:
    """The contents of one conversation, in the order in which they are created."""

    style: str
    kinds: list[str] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)

    def __call__(self, kind: str, *, number: bool = False) -> Any:
        """Return the next content."""
        position = len(self.values)
        value: Any
        if number:
            value = {"short": position + 3, "same": 5}.get(self.style, 777_000_100 + position)
        elif self.style == "sentinels":
            value = f"sentinel{position:03d}value"
        elif kind in (CALL, TOOLS):
            # Templates may refuse a name that is not an identifier.
            value = {"long": f"fetch_all_{position}", "short": "get", "same": "look_up"}[self.style]
        elif self.style == "long":
            value = f'Part {position} says <b>"hi"</b> & it\'s naïve: {position * 7919}'
        elif self.style == "short":
            words = ("Oslo", "yes", "no", "7", "ok", "go", "red", "tea", "cat", "dog")
            value = words[position % len(words)]
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


def features() -> dict[str, Callable[[Value], Conversation]]:
    """Return the conversation with each feature, by name."""
    table: dict[str, Callable[[Value], Conversation]] = {
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
        "tools": lambda new: ([user(new), answer(new)], [_tool(new)]),
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


def _tool(new: Value) -> dict[str, Any]:
    function = {
        "name": new(TOOLS),
        "description": new(TOOLS),
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    }
    return {"type": "function", "function": function}


def _call(new: Value, encode: Callable[[Any], Any], arguments: Callable[[], Any], key: str) -> Any:
    name = new(CALL)
    return {
        "id": key,
        "type": "function",
        "function": {"name": name, "arguments": encode(arguments())},
    }


def _result(new: Value, key: str) -> dict[str, Any]:
    return {"role": "tool", "content": new(MESSAGE), "tool_call_id": key, "name": "look_up"}


def _with_call(new: Value, encode: Callable[[Any], Any], *, text: bool) -> Conversation:
    question = user(new)
    content = new(TEXT_WITH_CALL) if text else ""
    call = _call(new, encode, lambda: {"city": new(ARGUMENT)}, "abcdefgh1")
    turn = {"role": "assistant", "content": content, "tool_calls": [call]}
    return [question, turn, _result(new, "abcdefgh1"), answer(new)], None


def _with_two_calls(new: Value, encode: Callable[[Any], Any]) -> Conversation:
    question = user(new)
    first = _call(
        new, encode, lambda: {"city": new(ARGUMENT), "n": new(ARGUMENT, number=True)}, "abcdefgh1"
    )
    second = _call(
        new, encode, lambda: {"all": [new(ARGUMENT), {"deep": new(ARGUMENT)}]}, "abcdefgh2"
    )
    turn = {"role": "assistant", "content": "", "tool_calls": [first, second]}
    results = [_result(new, "abcdefgh1"), _result(new, "abcdefgh2")]
    return [question, turn, *results, answer(new)], None


@dataclass
class Outcome:
    """Cases judged, those with a loss, and the differences by kind."""

    cases: int = 0
    lossy: int = 0
    missed: Counter[str] = field(default_factory=Counter)
    false_alarms: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)


def compare(templates: dict[str, str]) -> Outcome:
    """Judge every feature with every template."""
    outcome = Outcome()
    for template_name, source in sorted(templates.items()):
        template = ChatTemplate(source, variables=SPECIAL_TOKENS)
        check = ConservationCheck(
            lambda messages, tools, variables, template=template: (
                template.render(  # type: ignore[misc]
                    messages, tools=tools, template_kwargs=variables
                ).text
            )
        )
        for feature, make in features().items():
            expected = lost_in_transformers(source, make)
            if expected is None:
                continue
            for style in STYLES:
                messages, tools = make(Contents(style))
                try:
                    text = template.render(copy.deepcopy(messages), tools=tools).text
                except SftprepError:
                    continue
                found = check.find_missing(messages, tools, None, text).kinds
                outcome.cases += 1
                outcome.lossy += bool(expected)
                outcome.missed.update(expected - found)
                outcome.false_alarms.update(found - expected)
                if found != expected:
                    outcome.differences.append(
                        f"{template_name}, {feature}, {style}: {sorted(found)}, not"
                        f" {sorted(expected)}"
                    )
    return outcome


def lost_in_transformers(
    source: str, make: Callable[[Value], Conversation]
) -> frozenset[str] | None:
    """Return the kinds of content that transformers' rendering lacks; None if it is refused."""
    from transformers.utils.chat_template_utils import render_jinja_template

    contents = Contents("sentinels")
    messages, tools = make(contents)
    try:
        texts, _ = render_jinja_template(
            [messages], tools=tools, chat_template=source, **SPECIAL_TOKENS
        )
    except Exception:  # templates raise whatever they want
        return None
    lost: set[str] = set()
    is_call_shown = True
    for kind, value in zip(contents.kinds, contents.values, strict=True):
        shown = str(value) in texts[0]
        if kind == CALL:
            is_call_shown = shown
        if not shown and (is_call_shown or kind != ARGUMENT):
            lost.add(kind)
    return frozenset(lost)


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
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    templates = templates_of_trl()
    if arguments.tokenizers:
        templates |= templates_of_tokenizers(arguments.tokenizers)
    outcome = compare(templates)
    rows = {
        kind: {"missed": outcome.missed[kind], "false alarms": outcome.false_alarms[kind]}
        for kind in LOSSES
    }
    if arguments.json:
        print(json.dumps({"cases": outcome.cases, "with a loss": outcome.lossy, "kinds": rows}))
        return
    print(f"{len(templates)} templates, {outcome.cases:,} cases, {outcome.lossy:,} with a loss")
    print(f"{'':<28}{'missed':>8}{'false alarms':>14}")
    for kind, row in rows.items():
        print(f"{kind:<28}{row['missed']:>8}{row['false alarms']:>14}")
    for line in outcome.differences[:20]:
        print(line)


if __name__ == "__main__":
    main()
