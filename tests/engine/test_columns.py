"""What could set plain lines apart from others: renames, the order of lines and of keys, ends that
are there, many templates."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftprep.config import BuildConfig
from sftprep.engine.prepare import Preparer
from sftprep.engine.recipe import Recipe
from sftprep.engine.setup import prepare_recipe
from sftprep.records import FORMATS
from tests.engine.both_ways import both_ways
from tests.support import SHARED, needs_shared
from tests.tokenize.made import CHATML, END, START, STOP, byte_level, live

KEY_SHOWN = [
    "{% for m in messages %}{% for k in m %}{{ k }}={{ m[k] }};{% endfor %}{% endfor %}",
    "{% for m in messages %}{% for k, v in m.items() %}{{ k }}={{ v }};{% endfor %}{% endfor %}",
    "{% for m in messages %}{{ m | list | join(',') }}{{ m['content'] }}{% endfor %}",
    "{% for m in messages %}{{ m | list == messages[0] | list }}{{ m['content'] }}{% endfor %}",
]
TEMPLATES = [
    CHATML,
    *KEY_SHOWN,
    "{% for m in messages %}{% if m == messages[0] %}first{% endif %}{{ m.content }}{% endfor %}",
    "{% for m in messages | selectattr('content', 'eq', 'b') %}{{ m.content }}{% endfor %}",
    (
        "{% for m in messages %}{{ m.role ~ (m.content | trim) ~ (m.content | default('none',"
        " true)) }}{% endfor %}"
    ),
    (
        "{% set ns = namespace(last='') %}{% for m in messages %}{{ ns.last }}{% set ns.last ="
        " m.content %}{% endfor %}"
    ),
    (
        "{{ messages[-1].content.split('</think>')[-1].lstrip('\n') }}{% for m in messages %}{{"
        " m.content }}{% endfor %}"
    ),
    "{% for m in messages | reverse %}{{ m.content }}{{ m.content | length }}{% endfor %}",
    (
        "{% for m in messages %}{{ m.content.replace('b', m.role) }}{% if 'a' in m.content %}!{%"
        " endif %}{% endfor %}"
    ),
    (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{"
        " raise_exception('order') }}{% endif %}{{ m.content }}{% endfor %}"
    ),
]
PIECES = [
    "a",
    "b",
    " ",
    "\n",
    "<",
    "</think>",
    "\u0301",
    "\u00e9",
    "\u3000",
    "\x00",
    STOP,
    START,
    END,
    STOP[:4],
    STOP[4:],
    "中",
]
contents = st.lists(st.sampled_from(PIECES), max_size=4).map("".join)
KEYS = [
    "prompt",
    "completion",
    "text",
    "messages",
    "conversations",
    "q",
    "system",
    "tools",
    "input",
    "a\nb",
    'a"b',
    "\u00e9",
]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Recipe]:
    """Two plain recipes: of a tokenizer with an end token, and of one without."""
    made = {}
    for ended in (True, False):
        folder = tmp_path_factory.mktemp("tokenizer")
        own = {"eos_token": STOP} if ended else {}
        live(byte_level(nfc=True), chat_template=CHATML, pad_token=END, **own).save_pretrained(
            folder
        )
        made[ended], _ = prepare_recipe(
            BuildConfig.of(
                inputs="-", tokenizer=str(folder), output="-", format="messages", max_length=4096
            )
        )
    return made


def check(data: bytes, name: str, recipe: Recipe) -> list[int]:
    """Compare both ways; the lines that went by columns."""
    got, want, by_columns = both_ways(data, name, recipe)
    assert got.counts == want.counts
    return by_columns


def lines(*records: Any) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def chat(*said: str, content_first: bool = False) -> list[dict[str, str]]:
    turns = [
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant") * len(said), said, strict=False)
    ]
    return (
        [{"content": turn["content"], "role": turn["role"]} for turn in turns]
        if content_first
        else turns
    )


@settings(max_examples=150, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", ["messages", "sharegpt", "text", "prompt-completion"])
def test_renames(recipes: dict[bool, Recipe], name: str, data: st.DataObject) -> None:
    own = {"text": ["text"], "messages": ["messages"], "sharegpt": ["conversations"]}.get(
        name, ["prompt", "completion"]
    )
    pairs = st.tuples(st.sampled_from([*own, *KEYS]), st.sampled_from([*own, *KEYS]))
    renames = tuple(data.draw(st.lists(pairs, max_size=3)))
    values = st.just(chat("a", "b")) if own[0] in ("messages", "conversations") else contents
    sources = [source for source, target in renames if target in own]
    keys = st.lists(st.sampled_from([*own, *own, *sources, *KEYS]), unique=True, max_size=4)
    records = [
        {key: data.draw(values) for key in data.draw(keys)}
        for _ in range(data.draw(st.integers(1, 4)))
    ]
    check(lines(*records, *records), name, dataclasses.replace(recipes[True], renames=renames))


@pytest.mark.parametrize(
    ("name", "record", "renames"),
    [
        ("messages", {"messages": chat("a", "b")}, (("messages", "other"),)),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "a"}]},
            (("conversations", "other"),),
        ),
        ("text", {"text": "a"}, (("text", "other"),)),
        ("prompt-completion", {"completion": "a"}, (("completion", "prompt"),)),
    ],
)
def test_what_is_renamed_away_is_gone(
    recipes: dict[bool, Recipe], name: str, record: Any, renames: Any
) -> None:
    recipe = dataclasses.replace(recipes[True], renames=renames)
    assert check(lines(record, record), name, recipe) == []
    assert (
        len(Preparer(recipe, threads=False).prepare(lines(record, record), name, seed=0).rejected)
        == 2
    )


def test_renamed_keys_go_by_columns(recipes: dict[bool, Recipe]) -> None:
    rows = lines(*[{"question": "q", "answer": "a"}] * 3)
    renames = (("question", "prompt"), ("answer", "completion"))
    assert check(
        rows, "prompt-completion", dataclasses.replace(recipes[True], renames=renames)
    ) == [0, 1, 2]


def test_two_layouts_stay_in_the_order_of_lines(recipes: dict[bool, Recipe]) -> None:
    other = [{"from": "human", "value": "c"}, {"from": "gpt", "value": "d"}]
    mixed = [{"conversations": talk} for talk in (chat("a", "b"), other, chat("e", "f"), other)]
    assert check(lines(*mixed), "sharegpt", recipes[True]) == [0, 1, 2, 3]
    assert check(
        lines(mixed[0], [], *mixed, {"conversations": []}, mixed[1]), "sharegpt", recipes[True]
    ) == [0, 2, 3, 4, 5, 7]


@pytest.mark.parametrize("template", KEY_SHOWN)
def test_templates_that_show_the_order_of_keys(recipes: dict[bool, Recipe], template: str) -> None:
    first, last = chat("a", "b"), chat("c", "d", content_first=True)
    mixed = [first[0], last[1]]
    rows = lines(*[{"messages": talk} for talk in (first, last, mixed)] * 3)
    check(
        rows, "messages", dataclasses.replace(recipes[True], chat_template=template, train_on="all")
    )


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=25, deadline=None)
@given(
    said=st.lists(
        st.tuples(st.lists(contents, min_size=1, max_size=3), st.booleans()), min_size=1, max_size=5
    )
)
def test_templates(
    recipes: dict[bool, Recipe], template: str, said: list[tuple[list[str], bool]]
) -> None:
    rows = lines(*[{"messages": chat(*talk, content_first=turned)} for talk, turned in said] * 2)
    check(
        rows, "messages", dataclasses.replace(recipes[True], chat_template=template, train_on="all")
    )


@pytest.mark.parametrize("train_on", ["auto", "all", "completion", "assistant"])
@pytest.mark.parametrize("ended", [True, False])
@settings(max_examples=50, deadline=None)
@given(pairs=st.lists(st.tuples(contents, contents), min_size=1, max_size=5))
def test_ends_that_are_there_already(
    recipes: dict[bool, Recipe], train_on: Any, ended: bool, pairs: list[tuple[str, str]]
) -> None:
    recipe = dataclasses.replace(recipes[ended], train_on=train_on)
    check(
        lines(*[{"prompt": prompt, "completion": own} for prompt, own in pairs]),
        "prompt-completion",
        recipe,
    )
    check(lines(*[{"text": prompt + own} for prompt, own in pairs]), "text", recipe)


def test_an_end_that_starts_in_the_prompt(recipes: dict[bool, Recipe]) -> None:
    """A token in the text is for the general way, and the end of one that JSON hides is not."""
    rows = b"".join(
        b'{"prompt": "a<\\u007c", "completion": "%s"}\n' % own for own in (b"", b"im_end|>", b">")
    )
    recipe = dataclasses.replace(recipes[True], train_on="completion")
    assert check(rows, "prompt-completion", recipe) == [0, 1, 2]
    # Each letter of the token may be written as an escape, and then no look at the line finds it.
    hidden = "".join(f"\\u{ord(letter):04x}" if letter == "|" else letter for letter in STOP)
    split = [(hidden[:cut], hidden[cut:]) for cut in (0, 1, 7, len(hidden) - 1)]
    check(
        "".join(f'{{"prompt": "q{a}", "completion": "{b}"}}\n' for a, b in split).encode(),
        "prompt-completion",
        recipe,
    )


@needs_shared
@pytest.mark.parametrize(
    "file",
    sorted(SHARED.glob("tokenizers/_chat_templates*/*.jinja"))[::6],
    ids=lambda file: str(file.stem),
)
def test_real_templates(recipes: dict[bool, Recipe], file: Any) -> None:
    said = ["a", " b\n", "<think>c</think>d", "", "</think>", "<tool_call>", "\u3000e", "[INST]"]
    talks = [
        chat(one, other, content_first=turned)
        for one in said
        for other in said
        for turned in (False, True)
    ]
    talks += [[{"role": "system", "content": one}, *chat(one, "b", one, "d")] for one in said]
    train_on = "assistant" if "generation %}" in file.read_text() else "all"
    recipe = dataclasses.replace(
        recipes[True], chat_template=file.read_text(), train_on=train_on, date="2026-01-01"
    )
    check(lines(*[{"messages": talk} for talk in talks]), "messages", recipe)


@needs_shared
@pytest.mark.parametrize(
    "file", sorted(SHARED.glob("datasets/*.jsonl")), ids=lambda file: str(file.stem)
)
def test_real_data_in_every_format(recipes: dict[bool, Recipe], file: Any) -> None:
    data = b"".join(file.read_bytes().splitlines(keepends=True)[:60])
    for name in FORMATS.keys() - {"tokens", "text"}:
        check(data, name, recipes[True])
