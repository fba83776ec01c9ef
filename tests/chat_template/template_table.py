"""The table of docs/templates.md, which shows what each chat template supports.

`python -m tests.chat_template.template_table` updates it.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from sftprep.chat_template.assistant_spans import Unproven, derive_rule
from sftprep.chat_template.template import ChatTemplate
from sftprep.errors import TemplateError
from tests.chat_template.cases import TEMPLATES, VARIABLES, name_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "templates.md"
BEGIN, END = "<!-- table: python -m tests.chat_template.template_table -->", "<!-- end of table -->"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather_of",
            "description": "tells the weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "where"}},
                "required": ["city"],
            },
        },
    }
]


def talk(*, reasoning: bool = False, parts: bool = False) -> list[dict[str, Any]]:
    """Return two questions and two answers."""
    messages: list[dict[str, Any]] = []
    for asked, answered in (("How are you?", "Fine."), ("And now?", "Still fine.")):
        messages.append({"role": "user", "content": asked})
        messages.append(
            {"role": "assistant", "content": answered}
            | ({"reasoning_content": "Say so."} if reasoning else {})
        )
    return (
        [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        if parts
        else messages
    )


def call(arguments: Any) -> list[dict[str, Any]]:
    """Return a question, a call of a tool, its result and the answer."""
    calls = [
        {
            "id": "call00001",
            "type": "function",
            "function": {"name": "weather_of", "arguments": arguments},
        }
    ]
    return [
        {"role": "user", "content": "What is the weather in Wuhan?"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "name": "weather_of", "tool_call_id": "call00001", "content": "RAINY17"},
        {"role": "assistant", "content": "It rains."},
    ]


def template_of(path: Path, *, turns: bool = True, backend: Any = "auto") -> ChatTemplate:
    """Load a template for a test."""
    day = datetime.date(2026, 1, 31)
    return ChatTemplate(
        path.read_text(encoding="utf-8"),
        variables=VARIABLES,
        date=day,
        turns=turns,
        backend=backend,
    )


def text_of(template: ChatTemplate, messages: list[dict[str, Any]], **settings: Any) -> str | None:
    """Return the rendered text, None if the template rejects the conversation."""
    try:
        return template.render(messages, **settings).text
    except TemplateError:
        return None


def row(path: Path) -> str:
    """Return one line of the table."""
    template = template_of(path)
    try:
        rule = derive_rule(template)
    except Unproven as error:
        masks, beside = f"refused: {error.message}", "refused"
    else:
        masks = "derived"
        beside = (
            "derived"
            if rule.tools_fault is None
            else (
                "refused:"
                f" {rule.tools_fault.removeprefix('the chat template rejects the conversation: ')}"
            )
        )
    if template.has_generation_marks:
        masks = beside = "marks"
    shown = {kind: _shows_tools(template, arguments) for kind, arguments in _ARGUMENTS.items()}
    tools = ", ".join(kind for kind, shows in shown.items() if shows) or "no"
    if tools == "no":
        beside = "-"
    parts = "Still fine." not in (text_of(template, talk()) or "")
    kept = all(
        _is_kept(template, talk(reasoning=reasoning, parts=parts)) for reasoning in (False, True)
    )
    prefix = _is_prefix(template, talk(parts=parts))
    cells = (
        name_of(path),
        masks,
        tools,
        beside,
        "kept" if kept else "changes",
        "yes" if prefix else "no",
    )
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """Return the table."""
    head = (
        "| template | masks | tools: arguments as | masks beside tools | earlier turns | prompt is"
        " a prefix |"
    )
    return "\n".join([head, "|---|---|---|---|---|---|", *map(row, TEMPLATES)])


def page_with(table_text: str) -> str:
    """Return the page with this table."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table_text}\n{END}{after}"


_ARGUMENTS: dict[str, Any] = {"objects": {"city": "Wuhan"}, "text": '{"city": "Wuhan"}'}


def _shows_tools(template: ChatTemplate, arguments: Any) -> bool:
    text, asked = (
        text_of(template, call(arguments), tools=TOOLS),
        text_of(template, call(arguments)[:1], tools=TOOLS),
    )
    if text is None or asked is None:
        return False
    return (
        "RAINY17" in text
        and "It rains." in text
        and text.count("weather_of") > asked.count("weather_of")
    )


def _is_kept(template: ChatTemplate, messages: list[dict[str, Any]]) -> bool:
    whole, start = text_of(template, messages), text_of(template, messages[:2])
    return whole is not None and start is not None and whole.startswith(start)


def _is_prefix(template: ChatTemplate, messages: list[dict[str, Any]]) -> bool:
    whole, prompt = (
        text_of(template, messages),
        text_of(template, messages[:3], add_generation_prompt=True),
    )
    return whole is not None and prompt is not None and whole.startswith(prompt)


if __name__ == "__main__":
    PAGE.write_text(page_with(table()), encoding="utf-8")
