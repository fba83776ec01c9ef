"""Lines read by columns give what they give one by one: the same tokens, masks, origins, counts and
rejected records."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftprep.config import BuildConfig
from sftprep.engine.setup import prepare_recipe
from tests.engine.both_ways import both_ways
from tests.tokenize.made import CHATML, START, STOP, byte_level, live

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation"
    " %}{{ m.content | trim }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{%"
    " endif %}\n{% endfor %}"
)
PICKY = (
    "{% for m in messages %}{% if 'no' in m.content %}{{ raise_exception('refused') }}{% endif %}"
    "<|im_start|>{{ m.role }} {{ m.content if m.content else 'EMPTY' }}<|im_end|>{% endfor %}"
)
CONTENTS = [
    "a",
    "Hi there",
    "",
    " ",
    " b\n",
    "no",
    STOP,
    f"x{START}y",
    "<image>",
    "caf\u00e9",
    "e\u0301",
    "中文",
    "\u0378",
    "</s",
    STOP[:5],
]
COLUMN_KEYS = {"template.pieces", "template.jinja"}
"""How many conversations went which way is told of both ways together."""

contents = st.sampled_from(CONTENTS) | st.text(max_size=6)
turns = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "assistant", "system"]), "content": contents}
)
odd = st.sampled_from(
    [
        "",
        "no json",
        "[]",
        "{}",
        '{"messages": []}',
        '{"messages": null}',
        '{"text": 1}',
        '{"prompt": "p"}',
        '{"messages": [{}]}',
        "\t",
    ]
)
RECORDS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "messages": st.fixed_dictionaries(
        {"messages": st.lists(turns, min_size=1, max_size=3)},
        optional={"tools": st.just([]), "id": st.integers(0, 9)},
    ),
    "sharegpt": st.fixed_dictionaries(
        {
            "conversations": st.lists(
                st.fixed_dictionaries(
                    {"from": st.sampled_from(["human", "gpt", "function_call"]), "value": contents}
                ),
                min_size=1,
                max_size=3,
            )
        },
        optional={"system": contents},
    ),
    "text": st.fixed_dictionaries({"text": contents}, optional={"prompt": contents}),
    "prompt-completion": st.fixed_dictionaries(
        {"prompt": contents, "completion": contents}, optional={"q": contents}
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = {}
    for name, template in (("chatml", CHATML), ("marked", MARKED), ("picky", PICKY)):
        folder = tmp_path_factory.mktemp(name)
        live(byte_level(nfc=True), eos_token=STOP, chat_template=template).save_pretrained(folder)
        made[name] = str(folder)
    return made


def check(data: bytes, name: str, folder: str, **given_settings: Any) -> int:
    """Compare both ways; how many texts went by columns."""
    recipe, _ = prepare_recipe(
        BuildConfig.of(inputs="-", tokenizer=folder, output="-", format=name, **given_settings)
    )
    got, want, by_columns = both_ways(data, name, recipe, seed=1, sample=4)
    got_counts, want_counts = (
        {key: number for key, number in batch.counts.items() if number and key not in COLUMN_KEYS}
        for batch in (got, want)
    )
    assert got_counts == want_counts
    return len(by_columns)


SETTINGS: dict[str, list[dict[str, Any]]] = {
    "messages": [
        {},
        {"train_on": "assistant"},
        {"map": ("messages=messages",)},
        {"suspect": "reject"},
        {"escape_special": True},
    ],
    "sharegpt": [{}, {"max_length": 5}, {"max_length": 5, "overlong": "split"}],
    "text": [{}, {"map": ("prompt=text",)}, {"text_field": "prompt"}],
    "prompt-completion": [
        {},
        {"train_on": "all"},
        {"map": ("q=prompt",)},
        {"map": ("q=prompt", "prompt=q")},
    ],
}


@pytest.mark.parametrize("template", ["chatml", "marked", "picky"])
@pytest.mark.parametrize("name", RECORDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_both_ways_give_the_same(
    folders: dict[str, str], name: str, template: str, data: st.DataObject
) -> None:
    chosen = data.draw(
        st.sampled_from(
            [s for s in SETTINGS[name] if template == "marked" or s.get("train_on") != "assistant"]
        )
    )
    rows = data.draw(st.lists(RECORDS[name].map(json.dumps) | odd, min_size=1, max_size=8))
    rows += data.draw(st.sampled_from([[], rows]))  # shapes that come twice are worth it
    check("\n".join(rows).encode(), name, folders[template], **chosen)


@pytest.mark.parametrize("name", RECORDS)
def test_ordinary_records_go_by_columns(folders: dict[str, str], name: str) -> None:
    rows = {
        "messages": {
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " a "}]
        },
        "sharegpt": {
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
        },
        "text": {"text": "some text"},
        "prompt-completion": {"prompt": "q", "completion": "a"},
    }
    assert check((json.dumps(rows[name]) + "\n").encode() * 5, name, folders["chatml"]) == 5
