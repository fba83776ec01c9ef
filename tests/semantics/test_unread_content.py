"""What a record contains and no format reads: it is counted, or read from an unusual key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftprep import build
from sftprep.records.formats import read_record
from sftprep.records.options import InvalidRecord, RecordOptions
from sftprep.records.unread_turns import find_unread
from tests.semantics.conftest import CHATML
from tests.semantics.prepared import prepare
from tests.support import at_most

USER = {"role": "user", "content": "Name a tall lighthouse."}
ASSISTANT = {"role": "assistant", "content": "Roter Sand it is."}
HUMAN = {"from": "human", "value": "Name a tall lighthouse."}
GPT = {"from": "gpt", "value": "Roter Sand it is."}
NOTE = "keep it very short"
WITH_ANSWERS = CHATML.replace(
    "message['content']", "message['content'] + (message.answers or '')", 1
)


@pytest.fixture
def chatml_dir(folder_with: Any) -> Path:
    return folder_with(CHATML)


def warnings_of(record: dict[str, Any], folder: Path) -> set[str]:
    batch = prepare([record], folder).batch
    assert batch.rejected == []
    return {name.removeprefix("warnings.") for name in batch.counts if name.startswith("warn")}


def part(text: str, **keys: Any) -> dict[str, Any]:
    return {"type": "text", "text": text, **keys}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [USER, {**ASSISTANT, "note": NOTE}]},
        {"messages": [USER, {**ASSISTANT, "text": NOTE}]},
        {"messages": json.dumps([USER, {**ASSISTANT, "note": NOTE}])},
        {"messages": [USER, {**ASSISTANT, "note": {"inner": [NOTE]}}]},
        {"messages": [USER, {**ASSISTANT, "note": "请保持非常简短"}]},
        {
            "messages": [
                {"role": "user", "content": [part("Name it now.", caption=NOTE)]},
                ASSISTANT,
            ]
        },
        {"conversations": [HUMAN, {**GPT, "note": NOTE}]},
        {"prompt": [{**USER, "note": NOTE}], "completion": [ASSISTANT]},
        {"conversation": [{"user": "Hello to you", "assistant": "And to you", "note": NOTE}]},
    ],
)
def test_text_under_an_unknown_key_of_a_turn_is_counted(
    record: dict[str, Any], chatml_dir: Path
) -> None:
    assert warnings_of(record, chatml_dir) == {"key_not_shown"}


@pytest.mark.parametrize(
    ("turn", "is_counted"),
    [
        ({"role": "tool", "content": "", "result": 42}, True),
        ({"role": "tool", "content": "", "reading": 42}, True),
        ({"role": "tool", "content": "", "reading": {"value": 42.5, "unit": "m"}}, True),
        ({"role": "tool", "content": "", "value": "Oder"}, False),
        ({"role": "user", "content": "q q", "hint": "Oder"}, True),
        ({"role": "user", "content": "q q", "hint": "user"}, True),  # which the template writes
        ({"role": "user", "content": "q q", "river": "Oder"}, False),
        *(
            ({"role": "user", "content": "q q", key: "Oder"}, True)
            for key in ("thoughts", "cot", "thinking_content", "hints", "refusal", "summary")
        ),
        ({"role": "user", "content": "q q", "thinking_level": "high"}, False),
        ({"role": "user", "content": "q q", "thinking_tokens": "Oder"}, False),
        ({"role": "user", "content": "Oder", "answer": "Oder"}, False),
        ({"role": "tool", "content": "", "run_id": 42, "created": 5, "cached": True}, False),
        ({"role": "user", "content": "q q", "score": 0.5, "id": "x"}, False),
    ],
)
def test_a_single_word_or_number_is_counted_where_it_is_content(
    turn: dict[str, Any], is_counted: bool, chatml_dir: Path
) -> None:
    calls = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    called = {"role": "assistant", "content": "", "tool_calls": calls}
    between = [USER, called] if turn["role"] == "tool" else []
    found = warnings_of({"messages": [*between, turn, ASSISTANT]}, chatml_dir)
    assert ("key_not_shown" in found) == is_counted


@pytest.mark.parametrize("key", ["source", "url", "model", "lang", "language", "date", "id"])
@pytest.mark.parametrize(
    ("value", "is_counted"),
    [
        ("a long passage from the book", True),
        ("这是书中的一个很长的段落内容", True),
        ("https://example.org/a/b?c=d", False),
        ("Common Crawl", False),
        ("Mon Nov 29 16:00:05 UTC 2026", False),
        ("维基百科", False),
    ],
)
def test_prose_under_a_key_of_metadata_is_counted(
    key: str, value: str, is_counted: bool, chatml_dir: Path
) -> None:
    for keys in ({key: value}, {"meta": {key: value}}):
        found = warnings_of({"messages": [{**USER, **keys}, ASSISTANT]}, chatml_dir)
        assert found == ({"key_not_shown"} if is_counted else set())


@pytest.mark.parametrize(
    ("answer", "solution", "is_counted"),
    [
        ("4", "It is 14, I think", True),
        ("4", "It is 4.5", True),
        ("4", "It is 1,400", True),
        ("4", "It is 4.", False),
        ("4", "$4$", False),
        ("i", "this", True),
        ("Elbe", "Elbe4", True),
        ("a b", "xa b", True),
        ("北京", "答案是北京。", False),
        ("It is fourteen", "It is fourteen, I think", False),
    ],
)
def test_a_short_value_is_repeated_only_as_a_word(
    answer: str, solution: str, is_counted: bool, chatml_dir: Path
) -> None:
    record = {"problem": "Add seven.", "solution": solution, "answer": answer}
    found = warnings_of(record, chatml_dir)
    assert found == ({"column_not_read:answer"} if is_counted else set())


def test_a_column_of_bytes_is_not_repeated_by_the_word(chatml_dir: Path) -> None:
    record = {"messages": [{**USER, "content": "How many bytes?"}, ASSISTANT]}
    opaque = {**record, "hint": {"$opaque": "bytes"}}
    assert warnings_of(opaque, chatml_dir) == {"column_not_read:hint"}


@pytest.mark.parametrize(
    "key", ["content", "summary", "title", "passage", "body", "article", "transcript", "thoughts"]
)
def test_a_column_of_content_next_to_a_text_is_counted(key: str, chatml_dir: Path) -> None:
    found = warnings_of({"text": "It rains.", key: "Norderney"}, chatml_dir)
    assert found == {f"column_not_read:{key}"}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [USER, {**ASSISTANT, "mask": True}]},
        {"messages": [USER, {**ASSISTANT, "is_masked": False}]},
        {"messages": [USER, {"role": "assistant", "content": [part("a b c", train=False)]}]},
        {"conversations": [HUMAN, {**GPT, "ignore": 1}]},
        {"conversations": [HUMAN, {**GPT, "no_loss": True}]},
    ],
)
def test_a_switch_that_is_not_read_is_counted(record: dict[str, Any], chatml_dir: Path) -> None:
    assert warnings_of(record, chatml_dir) == {"switch_not_read"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("include_in_loss", False),
        ("compute_loss", False),
        ("use_for_training", False),
        ("loss_scale", 0.0),
        ("loss_scale", 0.3),
        ("weight_loss", 0),
        ("loss_weights", [0]),
        ("ignore_loss", True),
        ("mask_loss", True),
        ("ignore_in_training", True),
        ("learnable", False),
        ("exclude", True),
        ("skip", True),
        ("isTrainable", False),
        ("lossMask", 0),
        ("mask", "true"),
        ("mask", "assistant"),
        ("mask", "User"),
        ("label", 0),
        ("labels", False),
        ("meta", {"train": False}),
    ],
)
@pytest.mark.parametrize("turn", [ASSISTANT, GPT], ids=["messages", "sharegpt"])
def test_each_spelling_of_a_switch_is_counted(
    turn: dict[str, Any], key: str, value: Any, chatml_dir: Path
) -> None:
    record = {"messages": [USER, {**turn, key: value}]}
    assert warnings_of(record, chatml_dir) == {"switch_not_read"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("train_step", 1), ("label_id", 0), ("loss_value", 1.73), ("weight", None)),
        *(("label", "positive"), ("loss_weights", []), ("trainer", True), ("mask", "x7")),
    ],
)
def test_a_fact_about_a_turn_is_not_counted_as_a_switch(
    key: str, value: Any, chatml_dir: Path
) -> None:
    assert warnings_of({"messages": [USER, {**ASSISTANT, key: value}]}, chatml_dir) == set()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("weight", 0), ("weight", 0.5), ("loss_mask", [0, 1]), ("train_on_inputs", False)),
        *(("trainable", False), ("mask", "assistant"), ("lossWeights", [0.5, 1])),
    ],
)
@pytest.mark.parametrize(
    "record", [{"messages": [USER, ASSISTANT]}, {"prompt": "Ask it.", "completion": "So be it."}]
)
def test_a_switch_of_a_record_is_counted_by_its_name(
    record: dict[str, Any], key: str, value: Any, chatml_dir: Path
) -> None:
    rows = [record, {**record, key: value}]
    batch = prepare(rows, chatml_dir).batch
    counted = {n: line for n, line in batch.first_lines.items() if n.startswith("warn")}
    assert counted == {f"warnings.column_not_read:{key}": 1}


@pytest.mark.parametrize("value", ["on", "off", "High", " low ", "none", "enabled", True, False])
@pytest.mark.parametrize("key", ["reasoning", "thinking", "reasoning_effort"])
def test_a_mode_of_reasoning_is_not_content(key: str, value: Any, chatml_dir: Path) -> None:
    assert warnings_of({"messages": [USER, ASSISTANT], key: value}, chatml_dir) == set()


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [USER, {**ASSISTANT, "id": "a-1", "created": "2024-01-01", "model": "x y"}]},
        {"messages": [{**USER, "name": "Anna"}, {**ASSISTANT, "weight": 1, "edited": False}]},
        {"messages": [USER, {**ASSISTANT, "note": ASSISTANT["content"]}]},
        {"conversations": [HUMAN, {**GPT, "score": 0.5, "is_human": True}]},
        {
            "messages": [USER, ASSISTANT],
            "text": f"{USER['content']} {ASSISTANT['content']}",
            "id": 7,
        },
        {"messages": [USER, ASSISTANT], "source": "some web page", "rationale": None},
    ],
)
def test_ids_and_repeated_texts_are_not_counted(record: dict[str, Any], chatml_dir: Path) -> None:
    assert warnings_of(record, chatml_dir) - {"name_not_shown", "column_not_read:text"} == set()


@pytest.mark.parametrize("filled", [0, 30, 150])
def test_a_column_is_counted_wherever_it_begins(filled: int, chatml_dir: Path) -> None:
    rows: list[Any] = [{"messages": [USER, ASSISTANT], "Rationale": None} for _ in range(filled)]
    rows += [{"messages": [USER, ASSISTANT], "Rationale": "It is the oldest."}] * 2
    batch = prepare(rows, chatml_dir).batch
    assert batch.counts["warnings.column_not_read:Rationale"] == 2
    assert batch.first_lines["warnings.column_not_read:Rationale"] == filled


@pytest.mark.parametrize(
    ("turn", "shown"),
    [
        ({"role": "assistant", "content": "", "value": "the answer"}, "the answer"),
        ({"from": "gpt", "value": "", "content": "the answer"}, "the answer"),
        ({"from": "gpt", "value": None, "text": "the answer"}, "the answer"),
        ({"role": "assistant", "content": [part("", content="the answer")]}, "the answer"),
        (
            {
                "role": "assistant",
                "content": [{"type": "text", "text": None, "value": "the answer"}],
            },
            "the answer",
        ),
    ],
)
def test_an_empty_value_hides_no_other(turn: dict[str, Any], shown: str, chatml_dir: Path) -> None:
    key = "conversations" if "from" in turn else "messages"
    first = HUMAN if "from" in turn else USER
    made = prepare([{key: [first, turn]}], chatml_dir)
    assert f"assistant\n{shown}<|im_end|>" in made.text()


def read_messages(record: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return read_record(record, 0, name, RecordOptions()).messages or []


def test_thoughts_of_gemini_are_reasoning() -> None:
    parts = [{"text": "Let me think.", "thought": True}, {"text": "Six."}]
    contents = [{"role": "user", "parts": [{"text": "Three plus three?"}]}]
    record = {"contents": [*contents, {"role": "model", "parts": parts}]}
    (_, answer) = read_messages(record, "gemini")
    assert (answer["reasoning_content"], answer["content"]) == ("Let me think.", "Six.")


def test_a_turn_that_is_a_pair_keeps_its_context_and_reasoning() -> None:
    turn = {
        "instruction": "Translate.",
        "input": "Leuchtturm",
        "output": "Lighthouse",
        "system": "Be brief.",
        "reasoning": "A German noun.",
    }
    assert read_messages({"conversation": [turn]}, "conversation") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Translate.\nLeuchtturm"},
        {"role": "assistant", "content": "Lighthouse", "reasoning_content": "A German noun."},
    ]


def test_a_function_that_is_null_hides_no_name() -> None:
    call = {"function": None, "name": "f", "arguments": {"a": "b"}}
    (_, answer) = read_messages(
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]}, "messages"
    )
    assert answer["tool_calls"] == [{"name": "f", "arguments": {"a": "b"}}]


def test_other_keys_of_a_pair_belong_to_the_answer() -> None:
    turn = {"user": "Name it.", "assistant": "Roter Sand.", "train": False, "thinking": "high"}
    example = read_record({"conversation": [turn]}, 0, "conversation", RecordOptions())
    assert example.weights == [None, 0.0]
    assert "reasoning_content" not in (example.messages or [])[1]
    with pytest.raises(InvalidRecord, match="images"):
        read_messages({"conversation": [{**turn, "images": ["a.png"]}]}, "conversation")
    turn = {"instruction": "a", "input": {"b": 1}, "output": "c"}
    with pytest.raises(InvalidRecord, match='"input" is an object'):
        read_messages({"conversation": [turn]}, "conversation")


def test_reasoning_that_is_not_text_is_counted(chatml_dir: Path) -> None:
    record = {"messages": [USER, {**ASSISTANT, "reasoning": ["a long thought"]}]}
    assert warnings_of(record, chatml_dir) == {"key_not_shown"}


def test_a_text_that_a_later_turn_shows_is_not_counted(folder_with: Any) -> None:
    folder = folder_with(
        CHATML.replace("message['content']", "message['content'] + (message.note or '')", 1)
    )
    chat = [USER, ASSISTANT, USER, {**ASSISTANT, "note": NOTE}]
    batch = prepare([{"messages": chat}], folder, reasoning="expand").batch
    assert len(batch.lengths) == 2
    assert not any("key_not_shown" in name for name in batch.counts)


@pytest.mark.parametrize(("template", "is_shown"), [(CHATML, False), (WITH_ANSWERS, True)])
@pytest.mark.parametrize("reasoning", ["template", "expand"])
def test_a_word_that_another_turn_contains_is_not_shown(
    template: str, is_shown: bool, reasoning: str, folder_with: Any
) -> None:
    chat = [USER, {**ASSISTANT, "content": "Yes. Simple.", "answers": "Simple."}, USER, ASSISTANT]
    batch = prepare([{"messages": chat}], folder_with(template), reasoning=reasoning).batch
    assert batch.counts.get("warnings.key_not_shown", 0) == (not is_shown)


@pytest.mark.parametrize(
    ("column", "is_counted"),
    [
        ({"label": 0}, True),
        ({"tools": [{"name": "f"}], "functions": [{"name": "get_weather"}]}, True),
        ({"system": "Name a tall"}, False),  # it becomes the first message
    ],
)
def test_columns_beside_messages(
    column: dict[str, Any], is_counted: bool, chatml_dir: Path
) -> None:
    found = warnings_of({"messages": [USER, ASSISTANT], **column}, chatml_dir)
    assert any(name.startswith("column_not_read") for name in found) == is_counted


def test_a_system_prompt_within_another_message_is_not_read(chatml_dir: Path) -> None:
    first = {"role": "system", "content": "Be brief."}
    record = {"messages": [first, USER, ASSISTANT], "system": "Name a tall"}
    assert warnings_of(record, chatml_dir) == {"column_not_read:system"}


FUNCTION = {"name": "weather", "arguments": {"city": "Kiel"}}
CALL: dict[str, Any] = {"type": "function", "function": FUNCTION}


@pytest.mark.parametrize(
    "call",
    [
        {**CALL, "result": "it will rain all day"},
        {**CALL, "function": {**FUNCTION, "thought": "the user wants rain"}},
    ],
)
def test_text_of_a_call_besides_its_arguments_is_counted(
    call: dict[str, Any], folder_with: Any
) -> None:
    shows = "{% for m in messages %}{{ m.role }}{{ m.content }}{% for c in m.tool_calls or [] %}"
    shows += "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert "key_not_shown" in warnings_of({"messages": [USER, answer]}, folder_with(shows))
    without = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert "key_not_shown" not in warnings_of({"messages": [USER, without]}, folder_with(shows))


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"system": [{"text": "Quite another one."}]}, {"column_not_read:system"}),
        ({"deepseek_reasoning": "First I look at it."}, {"column_not_read:deepseek_reasoning"}),
        ({"reasoning_effort": "high", "system_id": "an id"}, set()),
        ({"label": False}, {"column_not_read:label"}),
        ({"text": f"User: {USER['content']} Bot: {ASSISTANT['content']}"}, set()),
    ],
)
def test_columns_whose_names_suggest_content(
    columns: dict[str, Any], found: set[str], chatml_dir: Path
) -> None:
    first = {"role": "system", "content": "Be brief."}
    record = {"messages": [first, USER, ASSISTANT], **columns}
    if "text" in columns:
        record = {"prompt": USER["content"], "response": ASSISTANT["content"], **columns}
    assert warnings_of(record, chatml_dir) == found


def test_an_answer_that_is_a_list_of_messages_is_read(chatml_dir: Path) -> None:
    assert warnings_of({"messages": [USER], "answer": [ASSISTANT]}, chatml_dir) == set()


def test_the_first_line_that_is_cut_is_known(chatml_dir: Path) -> None:
    rows = [{"text": "a"}, {"text": "a b c d e f g h"}, {"text": "a b c d e f g h"}]
    batch = prepare(rows, chatml_dir, max_length=4).batch
    assert batch.first_lines == {"truncated": 1}


def test_a_long_string_without_spaces_is_examined_in_linear_time() -> None:
    turn = {"role": "assistant", "content": "a", "audio": "UklGRiQAAABXQVZF" * 100_000}
    with at_most(20):
        assert find_unread([turn], [{"role": "assistant", "content": "a"}]) == ((), False)


@pytest.mark.parametrize("key", ["id", "note"])
def test_a_long_conversation_with_other_keys_is_read_in_linear_time(key: str) -> None:
    turns = [
        {"role": "user", "content": f"number {n}", key: f"{'please ' * (key == 'note')}keep {n}"}
        for n in range(100_000)
    ]
    with at_most(20):
        unread, _ = find_unread(turns, turns)
    assert bool(unread) == (key == "note")


words = st.text("abcdefgh", min_size=3, max_size=8)
sentences = st.tuples(words, words).map(" ".join)
values = st.recursive(
    sentences | st.none() | st.booleans() | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)


def strings_in(value: Any) -> set[str]:
    if isinstance(value, str):
        return {value}
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return {text for item in items for text in strings_in(item)}


@given(st.dictionaries(words, values, max_size=4), sentences, st.booleans())
def test_each_sentence_of_a_turn_is_read_or_found(
    others: dict[str, Any], content: str, is_value: bool
) -> None:
    turn = {
        **others,
        **(
            {"from": "gpt", "value": content}
            if is_value
            else {"role": "assistant", "content": content}
        ),
    }
    messages = [{"role": "assistant", "content": content}]
    unread, _ = find_unread([turn], messages)
    assert set(unread) == {text for text in strings_in(others) if text not in content}


@pytest.mark.parametrize("is_first", [True, False])
def test_text_next_to_the_array_of_a_document_is_named(
    is_first: bool, chatml_dir: Path, tmp_path: Path, caplog: Any
) -> None:
    other = {"version": "v2.0", "instruction": "Answer like a pirate always."}
    data = {"data": [{"messages": [USER, ASSISTANT]}]}
    file = tmp_path / "doc.json"
    file.write_text(json.dumps({**other, **data} if is_first else {**data, **other}))
    build(file, tokenizer=chatml_dir, output=tmp_path / "out")
    logged = [r.getMessage() for r in caplog.records if "only the array" in r.getMessage()]
    assert len(logged) == 1
    assert (
        f"{file}: only the array 'data' is read, and not the text under 'instruction'" in logged[0]
    )


@pytest.mark.parametrize(
    ("system", "is_counted"),
    [
        ([part("Be brief."), part("Be kind.", cache_control={"type": "ephemeral"})], False),
        ({"role": "system", "parts": [{"text": "Be brief."}]}, False),
        ([part("Be brief.", note=NOTE)], True),
    ],
)
def test_a_system_prompt_in_parts_is_read(system: Any, is_counted: bool, chatml_dir: Path) -> None:
    record = {"messages": [USER, ASSISTANT], "system": system}
    assert "Be brief." in prepare([record], chatml_dir).text()
    assert warnings_of(record, chatml_dir) == ({"column_not_read:system"} if is_counted else set())


def test_a_system_prompt_in_parts_is_not_read_alongside_another_one(chatml_dir: Path) -> None:
    first = {"role": "system", "content": "Be brief."}
    record = {"messages": [first, USER, ASSISTANT], "system": [part("Kind.")]}
    assert warnings_of(record, chatml_dir) == {"column_not_read:system"}


@pytest.mark.parametrize("key", ["instructions", "developer"])
def test_instructions_beside_messages_are_counted(key: str, chatml_dir: Path) -> None:
    record = {"messages": [USER, ASSISTANT], key: "Answer in one sentence."}
    assert warnings_of(record, chatml_dir) == {f"column_not_read:{key}"}
    # A single word is a value such as a name.
    assert warnings_of({**record, key: "Kiel"}, chatml_dir) == set()


@pytest.mark.parametrize(
    ("text_field", "reason"), [("text", "bad_row"), ("body", "other_text_field")]
)
def test_a_null_text_is_not_taken_for_a_line_of_a_text_file(text_field: str, reason: str) -> None:
    options = RecordOptions(text_field=text_field)
    with pytest.raises(InvalidRecord) as caught:
        read_record({"text": None if text_field == "text" else "a"}, 0, "text", options)
    assert caught.value.reason == reason


@pytest.mark.parametrize("turn", [USER, {"role": "tool", "content": "It rains."}])
def test_reasoning_of_others_than_the_assistant_is_a_key_that_is_not_read(
    turn: dict[str, Any], chatml_dir: Path
) -> None:
    messages = [USER, ASSISTANT, {**turn, "reasoning_content": NOTE}, ASSISTANT]
    found = warnings_of({"messages": messages}, chatml_dir)
    assert found - {"bad_tool", "role_order"} == {"key_not_shown"}
