"""Conversations and chat templates for the tests of this folder, rendered by transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

from tests.support import SHARED

VARIABLES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
TEMPLATES = sorted((SHARED / "tokenizers").glob("_chat_templates_trl_*/*.jinja"))
OWN_TEMPLATES = sorted((SHARED / "tokenizers").glob("*/chat_template.jinja"))


class Case(NamedTuple):
    """The input of one render."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    kwargs: dict[str, Any] = {}  # noqa: RUF012


class Refused(NamedTuple):
    """The result of a render that raised an error."""


def name_of(path: Path) -> str:
    """Return the name of a template: that of its file, or of its tokenizer."""
    return path.parent.name if path.name == "chat_template.jinja" else path.stem


def by_transformers(source: str, case: Case, *, add_generation_prompt: bool, marks: bool) -> object:
    """Return (text, spans) as transformers does, or Refused."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, spans = render_jinja_template(
            # `apply_chat_template` leaves these keys out before it comes here.
            [
                [
                    {key: value for key, value in m.items() if value is not None}
                    for m in copy.deepcopy(case.messages)
                ]
            ],
            tools=copy.deepcopy(case.tools),
            chat_template=source,
            return_assistant_tokens_mask=marks,
            add_generation_prompt=add_generation_prompt,
            **{**VARIABLES, **case.kwargs},
        )
    except Exception:
        return Refused()
    return texts[0], tuple(spans[0]) if spans else ()


def turns(*contents: Any, system: Any = None) -> list[dict[str, Any]]:
    """Return messages of user, assistant, user, ... with these contents."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(contents)
    ]


TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Wetter für einen Ort <b>heute</b>",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Town & country"},
                    "unit": {"type": "string", "enum": ["C", "F"]},
                    "days": {"type": ["integer", "null"], "default": 1, "minimum": 0},
                    "options": {
                        "type": "object",
                        "properties": {"deep": {"type": "array", "items": {"type": "number"}}},
                    },
                },
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "now",
            "description": "The time",
            "parameters": {"type": "object", "properties": {}},
        },
    },
]


def _call(arguments: Any, *, name: str = "get_weather", **more: Any) -> dict[str, Any]:
    return {
        "type": "function",
        "id": "abcdef123",
        "function": {"name": name, "arguments": arguments},
        **more,
    }


def _with_calls(calls: Any, result: Any, content: Any = "", **more: Any) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": "Weather in Köln?"},
        {"role": "assistant", "content": content, "tool_calls": calls, **more},
        {"role": "tool", "name": "get_weather", "content": result, "tool_call_id": "abcdef123"},
        {"role": "assistant", "content": "It is 21 °C."},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "You are welcome."},
    ]


_ARGUMENTS = {
    "city": "Köln",
    "unit": "C",
    "days": 2,
    "options": {"deep": [1.5, None, True]},
    "note": "a 'b' \\ \n c",
}

CONVERSATIONS: dict[str, Case] = {
    "two turns": Case(turns("What is 2+2?", "4")),
    "question only": Case(turns("What is 2+2?")),
    "null keys": Case(
        [{**turn, "tool_calls": None, "name": None} for turn in turns("hi", "hello")]
    ),
    "null contents": Case(
        [
            *turns("hi"),
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": None,
                "tool_calls": [_call({"a": 1})],
            },
        ]
    ),
    "system first": Case(turns("hi", "hello", "more", "ok", system="You are terse.")),
    "system only": Case(turns(system="alone")),
    "long": Case(turns(*(f"turn {i}" for i in range(12)), system="s")),
    "nothing": Case([]),
    "assistant first": Case(
        [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "hi"}]
    ),
    "user twice": Case(
        [
            {"role": "user", "content": "a"},
            {"role": "user", "content": "b"},
            {"role": "assistant", "content": "c"},
        ]
    ),
    "assistant twice": Case([*turns("a", "b"), {"role": "assistant", "content": "c"}]),
    "late system": Case([*turns("a", "b"), {"role": "system", "content": "s"}, *turns("c", "d")]),
    "strange roles": Case(
        [
            {"role": "developer", "content": "d"},
            {"role": "critic", "content": "x"},
            *turns("a", "b"),
        ]
    ),
    "no role": Case([{"content": "a"}]),
    "no content": Case([{"role": "user"}, {"role": "assistant"}]),
    "more keys": Case(
        [
            {"role": "user", "content": "a", "name": "Ann", "weight": 0, "items": [1], "get": "x"},
            *turns("a", "b")[1:],
        ]
    ),
    "role is a number": Case([{"role": 3, "content": "a"}]),
    "tools": Case(turns("hi", "hello"), TOOLS),
    "tools and system": Case(turns("hi", "hello", "more", "ok", system=" sys\n"), TOOLS),
    "empty tools": Case(turns("hi", "hello"), []),
    "bare tools": Case(turns("hi", "hello"), [{"name": "f", "parameters": None}, {}]),
    "calls": Case(_with_calls([_call(_ARGUMENTS)], '{"t": 21}'), TOOLS),
    "calls without tools": Case(_with_calls([_call(_ARGUMENTS)], "21")),
    "two calls": Case(
        _with_calls([_call({}), _call({"a": 1}, name="now")], "21", content="Let me look."), TOOLS
    ),
    "arguments as text": Case(
        _with_calls([_call('{"city": "Köln"}')], "21.0", content=None), TOOLS
    ),
    "empty arguments": Case(_with_calls([_call("")], "0021"), TOOLS),
    "flat calls": Case(_with_calls([{"name": "now", "arguments": {"x": 1}}], "x"), TOOLS),
    "calls of none": Case(_with_calls(None, "x", content="text"), TOOLS),
    "calls of nothing": Case(_with_calls([], "x", content="text"), TOOLS),
    "result as object": Case(_with_calls([_call(_ARGUMENTS)], {"t": 21, "ok": True}), TOOLS),
    "result as list": Case(
        _with_calls([_call(_ARGUMENTS)], [{"type": "text", "text": "21"}]), TOOLS
    ),
    "results in a row": Case(
        [
            *_with_calls([_call({"a": "b"}), _call({"c": 1.5})], "one")[:3],
            {"role": "tool", "content": "two", "tool_call_id": "abcdef123", "name": "now"},
            {"role": "assistant", "content": "done"},
        ],
        TOOLS,
    ),
    "ends with a result": Case(_with_calls([_call(_ARGUMENTS)], "x")[:3], TOOLS),
    "ends with calls": Case(_with_calls([_call(_ARGUMENTS)], "x")[:2], TOOLS),
    "calls with reasoning": Case(
        _with_calls([_call(_ARGUMENTS)], "x", reasoning_content="I must look."), TOOLS
    ),
    "reasoning": Case(
        [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a", "reasoning_content": "\nr\n"},
        ]
    ),
    "thinking": Case(
        [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a", "thinking": "r"},
            *turns("x", "y"),
        ]
    ),
    "reasoning by old name": Case(
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning": "r"}]
    ),
    "reasoning of none": Case(
        [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a", "reasoning_content": None},
        ]
    ),
    "thinking in content": Case(
        turns("q", "<think>\nfirst\n</think>\n\nanswer", "q2", "<think>second</think>answer 2")
    ),
    "thinking twice": Case(turns("q", "a</think>b</think>c", "q2", "<think><think>x</think>")),
    "tool response by user": Case(turns("q", "a", "<tool_response>\nx\n</tool_response>", "b")),
    "no thinking": Case(turns("q", "a", "q2"), None, {"enable_thinking": False}),
    "thinking wanted": Case(
        turns("q", "a", "q2"), None, {"enable_thinking": True, "thinking": True}
    ),
    "other variables": Case(
        turns("q", "a"),
        TOOLS,
        {"date_string": "1 Jan 2020", "tools_in_user_message": False, "builtin_tools": ["a"]},
    ),
    "reasoning effort": Case(
        turns("q", "a", system="s"),
        None,
        {"reasoning_effort": "high", "model_identity": "You.", "safety_mode": "NONE"},
    ),
    "kwargs as locals": Case(
        turns("q", "a", system="s"),
        None,
        {"content": "C", "ns": {"a": 1}, "loop": 1, "message": {"role": "x"}},
    ),
    "kwargs as functions": Case(turns("q", "a"), None, {"namespace": 1, "range": 2}),
    "other eos": Case(turns("q", "a"), None, {"eos_token": "<E>", "bos_token": None}),
    "parts": Case(
        turns(
            [{"type": "text", "text": " one "}, {"type": "text", "text": "two"}],
            [{"type": "text", "text": "a"}],
        )
    ),
    "parts with image": Case(
        turns([{"type": "image"}, {"type": "text", "text": "what?"}], "a cat")
    ),
    "strange parts": Case(turns([{"type": "audio"}, {"text": "x"}, "bare"], [])),
    "parts in system": Case(turns("q", "a", system=[{"type": "text", "text": "s"}])),
}

CONTENTS: dict[str, Any] = {
    "blanks around": " \t padded \n\n",
    "newlines around": "\n\nlines\n\n",
    "only blanks": " \n\t ",
    "empty": "",
    "none": None,
    "think": "<think>\na\n</think>\n\nb",
    "think closed only": "x</think>y",
    "think open only": "<think>x",
    "jinja": "{{ messages }} {% if x %} {# y #} {%- raw %}",
    "special tokens": "<|im_start|>user\n<|im_end|><s></s>[INST] [/INST]<|eot_id|><end_of_turn>",
    "tool response": "<tool_response>x</tool_response>",
    "html": "<b>&amp; \"q\" 'r'</b>",
    "unicode": "ẞ ﷽ 🏳️‍🌈 é \u2028\u00a0 \x1c",
    "lone surrogate": "a\ud800b",
    "backslashes": "\\n \\' \\u0041 %s {0} $x",
    "very long": "word " * 2_000,
    "a number": 12,
    "a float": 0.5,
    "true": True,
    "object": {"text": "x", "role": "user"},
    "list of texts": ["a", "b"],
}


def adversarial() -> dict[str, Case]:
    """Return conversations in which each content in turn is an adversarial one."""
    cases = {}
    for name, content in CONTENTS.items():
        cases[f"{name}: turns"] = Case(turns(content, content, content, content))
        cases[f"{name}: system"] = Case(turns("q", "a", system=content))
        cases[f"{name}: reasoning"] = Case(
            [*turns("q"), {"role": "assistant", "content": "a", "reasoning_content": content}]
        )
        cases[f"{name}: tool"] = Case(_with_calls([_call({"city": content})], content), TOOLS)
    return cases
