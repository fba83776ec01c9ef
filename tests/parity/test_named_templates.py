"""A tokenizer with several chat templates: each conversation gets the one that TRL uses for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from sftprep import build
from sftprep.errors import TemplateError
from tests.parity.our_side import our_sequences
from tests.parity.test_trl import WAYS, assert_same
from tests.parity.trl_side import trl_sequences

pytest.importorskip("trl")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% generation %}{{ m.content }}CALLS<|im_end|>{% endgeneration %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALLS = "{% for c in m.tool_calls or [] %}call {{ c.function | tojson }}{% endfor %}"
DEFAULT = TURNS.replace("CALLS", "")
TOOL_USE = "tools: {{ tools | tojson }}\n" + TURNS.replace("CALLS", CALLS)
UNMARKED = {"{% generation %}": "", "{% endgeneration %}": ""}
TOOL = {"type": "function", "function": {"name": "tide_table", "parameters": {"type": "object"}}}
CHAT = [{"role": "user", "content": "When?"}, {"role": "assistant", "content": "At two."}]
CALLING = [
    CHAT[0],
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": "tide_table", "arguments": {"a": "b"}}}
        ],
    },
    {"role": "tool", "content": "14:05"},
    CHAT[1],
]
ROWS = {
    "messages": [
        {"messages": CALLING, "tools": [TOOL]},
        {"messages": CHAT, "tools": [TOOL]},
        {"messages": CHAT},
        {"messages": CHAT, "tools": None},
    ],
    "completions": [
        {"prompt": CALLING[:1], "completion": CALLING[1:], "tools": [TOOL]},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
    ],
}


def with_templates(folder: Path, source: Path, templates: dict[str, str], *, files: bool) -> Path:
    """A tokenizer with named templates, in its config or in files of their own."""
    folder.mkdir()
    shutil.copy(source / "tokenizer.json", folder)
    config = json.loads((source / "tokenizer_config.json").read_text())
    if files:
        (folder / "additional_chat_templates").mkdir()
        for name, template in templates.items():
            path = f"additional_chat_templates/{name}" if name != "default" else "chat_template"
            (folder / f"{path}.jinja").write_text(template)
    else:
        config["chat_template"] = [
            {"name": name, "template": template} for name, template in templates.items()
        ]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def unmarked(template: str) -> str:
    for mark, nothing in UNMARKED.items():
        template = template.replace(mark, nothing)
    return template


@pytest.mark.parametrize("files", [False, True])
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("assistant_only", [False, True])
def test_records_with_tools_get_the_template_for_tools(
    files, kind, assistant_only, tokenizer_dir, tmp_path
):
    templates = {"default": DEFAULT, "tool_use": TOOL_USE, "rag": "unused"}
    if not assistant_only:
        templates = {name: unmarked(template) for name, template in templates.items()}
    folder = with_templates(tmp_path / "t", tokenizer_dir, templates, files=files)
    rows = ROWS[kind]
    theirs = trl_sequences(
        rows, folder, tmp_path / "trl", max_length=512, assistant_only_loss=assistant_only
    )
    train_on = {"train_on": "assistant"} if assistant_only else {}
    for encoder, way in WAYS:
        settings = {"max_length": 512, "encoder": encoder, "template_backend": way, **train_on}
        assert_same(our_sequences(rows, folder, **settings), theirs)


def test_masks_are_derived_from_the_template_of_the_record(tokenizer_dir, tmp_path):
    templates = {"default": unmarked(DEFAULT), "tool_use": unmarked(TOOL_USE)}
    folder = with_templates(tmp_path / "t", tokenizer_dir, templates, files=False)
    rows = [ROWS["messages"][0], ROWS["messages"][2]]
    ours = our_sequences(rows, folder, max_length=512, train_on="assistant")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trained = [
        tokenizer.decode([token for token, kept in zip(*row, strict=True) if kept]) for row in ours
    ]
    call = 'call {"name": "tide_table", "arguments": {"a": "b"}}<|im_end|>'
    assert trained == [f"{call}At two.<|im_end|>", "At two.<|im_end|>"]


def test_calls_as_text_are_shown_as_the_template_for_tools_can(tokenizer_dir, tmp_path):
    templates = {"default": unmarked(DEFAULT), "tool_use": unmarked(TOOL_USE)}
    folder = with_templates(tmp_path / "t", tokenizer_dir, templates, files=False)
    turns = [
        {"from": "human", "value": "When?"},
        {"from": "function_call", "value": '{"name": "tide_table", "arguments": {"a": "b"}}'},
    ]
    rows = [{"conversations": turns, "tools": json.dumps([TOOL])}, {"conversations": turns}]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with_tools, without = (
        tokenizer.decode(ids) for ids, _ in our_sequences(rows, folder, max_length=512)
    )
    assert 'call {"name": "tide_table"' in with_tools
    assert 'assistant\n{"name": "tide_table"' in without


def test_a_template_is_chosen_by_its_name(tokenizer_dir, tmp_path):
    templates = {"rag": "rag " + unmarked(DEFAULT), "tool_use": unmarked(TOOL_USE)}
    folder = with_templates(tmp_path / "t", tokenizer_dir, templates, files=False)
    rows = ROWS["messages"][1:3]
    theirs = trl_sequences(
        rows, folder, tmp_path / "trl", max_length=512, template=templates["rag"]
    )
    assert_same(our_sequences(rows, folder, max_length=512, chat_template="rag"), theirs)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(TemplateError, match="rag, tool_use, but none named default") as caught:
        build(str(path), tokenizer=str(folder), output=tmp_path / "o")
    assert 'chat_template="rag"' in caught.value.remedy
