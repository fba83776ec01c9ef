"""Images of records: what is removed with `images="drop"`, and what only looks like an image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftprep import build
from tests.semantics.prepared import prepare
from tests.support import rejected_file

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
)
IMAGE = {"type": "image_url", "image_url": {"url": "dog.png"}}
TEXT = {"type": "text", "text": "Turn <image> it."}
ANSWER = {"role": "assistant", "content": "Done."}


def turns(call: dict[str, Any], result: Any = "ok") -> list[dict[str, Any]]:
    question = {"role": "user", "content": [IMAGE, TEXT]}
    return [question, {"role": "assistant", **call}, {"role": "tool", "content": result}, ANSWER]


def openai(arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "rotate", "arguments": arguments}}
    return {"content": "", "tool_calls": [call]}


def anthropic(arguments: Any) -> dict[str, Any]:
    return {"content": [{"type": "tool_use", "id": "a", "name": "rotate", "input": arguments}]}


def gemini(arguments: Any) -> dict[str, Any]:
    return {"content": [{"functionCall": {"name": "rotate", "args": arguments}}]}


def older(arguments: Any) -> dict[str, Any]:
    return {"content": "", "function_call": {"name": "rotate", "arguments": arguments}}


ARGUMENTS = [
    {"image": "cat.png", "deg": 90},
    {"images": ["cat.png"]},
    {"items": [{"type": "image", "src": "cat.png"}, {"image": "cat.png"}]},
    {"html": "<image>\nfull"},
]


@pytest.mark.parametrize("layout", [openai, anthropic, gemini, older])
@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_arguments_of_calls_are_no_images(folder_with: Any, layout: Any, arguments: Any) -> None:
    made = prepare([{"messages": turns(layout(arguments))}], folder_with(TEMPLATE), images="drop")
    assert made.batch.counts["warnings.images_dropped"] == 1
    _, _, shown = made.text().partition("<|im_start|>assistant\n")
    assert json.loads(shown.partition("<|im_end|>")[0]) == arguments
    assert "user\nTurn  it.<|im_end|>" in made.text()


@pytest.mark.parametrize("images", ["drop", "error"])
def test_without_an_image_calls_and_results_do_not_count_as_one(
    folder_with: Any, images: str
) -> None:
    messages = turns(openai(ARGUMENTS[0]), {"image": "cat.png", "ok": True})
    messages[0] = {"role": "user", "content": "Turn it."}
    made = prepare([{"messages": messages}], folder_with(TEMPLATE), images=images)
    assert made.batch.rejected == []
    assert "warnings.images_dropped" not in made.batch.counts
    assert 'tool\n{"image": "cat.png", "ok": true}<|im_end|>' in made.text()


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ({"image": "cat.png", "ok": True}, '{"image": "cat.png", "ok": true}'),
        ('{"html": "<image>"}', '{"html": "<image>"}'),
        ([IMAGE, {"type": "text", "text": "turned"}], "turned"),
    ],
)
def test_results_of_tools_lose_only_image_parts(
    folder_with: Any, result: Any, expected: str
) -> None:
    rows = [
        {"messages": turns(openai({"a": "b"}), result)},
        {"messages": turns(anthropic({"a": "b"}), result)},
    ]
    part = {"type": "tool_result", "tool_use_id": "a", "content": result}
    rows[1]["messages"][2] = {"role": "user", "content": [part]}
    made = prepare(rows, folder_with(TEMPLATE), images="drop")
    assert made.batch.rejected == []
    for number in range(2):
        assert f"tool\n{expected}<|im_end|>" in made.text(number)


def test_turns_of_calls_and_answers_that_are_calls_are_left_as_they_are(folder_with: Any) -> None:
    call = json.dumps({"name": "rotate", "arguments": {"html": "<image>"}})
    rows = [
        {
            "conversations": [
                {"from": "human", "value": "<image>Turn it."},
                {"from": "function_call", "value": call},
            ],
            "images": ["dog.png"],
        },
    ]
    pair = {"question": "<image>Turn it.", "answer": call, "images": ["dog.png"]}
    pair["tools"] = [{"name": "rotate", "description": "Turns."}]
    for row in (*rows, pair):
        text = prepare([row], folder_with(TEMPLATE), images="drop").text()
        assert text.startswith("<|im_start|>user\nTurn it.<|im_end|>")
        assert "<image>" in text.partition("assistant")[2], text


def test_an_image_of_a_table_without_bytes_and_path_is_empty(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    empty, byte, path = (
        {"bytes": b, "path": p} for b, p in ((None, None), (b"x", None), (None, "a"))
    )
    table = pa.table(
        {
            "text": ["Roter Sand"] * 6,
            "picture": pa.array([empty, None, byte, path, empty, None], kind),
            "images": pa.array([[empty], [], [], None, [empty, byte], None], pa.list_(kind)),
        }
    )
    for suffix in ("parquet", "arrow"):
        file = tmp_path / f"a.{suffix}"
        if suffix == "parquet":
            pq.write_table(table, file, row_group_size=4)
        else:
            with pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
        report = build(
            file,
            output=tmp_path / suffix,
            tokenizer=tokenizer_dir,
            on_bad_record="quarantine",
            max_rejected="100%",
        )
        assert report.manifest.accounting.rejected == {"images": 3}
        rejected = rejected_file(tmp_path / suffix).read_text().splitlines()
        assert [json.loads(line)["line"] for line in rejected] == [3, 4, 5]


def test_an_image_of_an_iterable_without_bytes_and_path_is_empty(tokenizer_dir: Path) -> None:
    from sftprep.sources.readers.to_jsonl import rows_to_lines

    empty = {"bytes": None, "path": None}
    rows = [{"text": "a", "image": empty}, {"text": "a", "image": [empty]}]
    full = [{"text": "a", "image": {"bytes": b"x", "path": None}}]
    full.append({"text": "a", "image": [empty, *[full[0]["image"]]]})
    lines = rows_to_lines([*rows, *full]).decode().splitlines()
    made = prepare(lines, tokenizer_dir, format="text")
    assert [record.line for record in made.batch.rejected] == [2, 3]


CAPTION = "A dog on the dike."


@pytest.mark.parametrize("as_json", [False, True])
def test_the_text_of_an_image_part_is_kept(folder_with: Any, as_json: bool) -> None:
    parts = [TEXT, {**IMAGE, "text": CAPTION}]
    messages: Any = [{"role": "user", "content": parts}, ANSWER]
    row = {"messages": json.dumps(messages) if as_json else messages}
    made = prepare([row], folder_with(TEMPLATE), images="drop")
    assert f"user\nTurn  it.{CAPTION}<|im_end|>" in made.text()
    assert made.batch.rejected == []
    assert [n for n in made.batch.counts if n.startswith("warn")] == ["warnings.images_dropped"]


@pytest.mark.parametrize(
    ("messages", "columns", "warning"),
    [
        ([{"role": "user", "content": [TEXT, {**IMAGE, "alt": CAPTION}]}], {}, "key_not_shown"),
        (
            [{"role": "user", "content": "q", "image": {"path": "a.png", "caption": "Dog"}}],
            {},
            "key_not_shown",
        ),
        (
            [{"role": "user", "content": "q"}],
            {"image": {"caption": CAPTION, "bytes": None, "path": None}},
            "column_not_read:caption",
        ),
        (
            [{"role": "user", "content": "q"}],
            {"images": [{"path": "the dog.png"}, {"path": "b.png", "caption": CAPTION}]},
            "column_not_read:caption",
        ),
        (
            [{"role": "user", "content": "q"}],
            {"images": [{"path": "the dog on the dike.png", "bytes": "aGk="}]},
            None,
        ),
    ],
)
def test_other_text_of_an_image_is_counted(
    folder_with: Any, messages: list[Any], columns: dict[str, Any], warning: str | None
) -> None:
    row = {"messages": [*messages, ANSWER], **columns}
    made = prepare([row], folder_with(TEMPLATE), images="drop")
    found = {name.removeprefix("warnings.") for name in made.batch.counts if "warn" in name}
    assert found == {"images_dropped"} | ({warning} if warning else set())
