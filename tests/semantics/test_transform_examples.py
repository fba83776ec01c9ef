"""The example of a transform in the error for records of unknown format: it runs on the record."""

from __future__ import annotations

import copy
import json
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sftprep import build
from sftprep.errors import FlagNames, FormatError, render_settings
from sftprep.records.formats import read_record
from sftprep.records.inspection.suggestions import suggest
from sftprep.records.inspection.transform_example import transform_example
from sftprep.records.options import RecordOptions
from tests.semantics.test_shapes import shapes
from tests.support import needs_shared

U, A = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "reply"}


def run(code: str, record: Any) -> Any:
    """Execute an example, and return what it returns for a record."""
    names: dict[str, Any] = {}
    exec(compile(code, "convert.py", "exec"), names)
    return names["to_chat"](copy.deepcopy(record))


def suggested(record: Any) -> str:
    (text,) = suggest(record, RecordOptions())
    return render_settings(text, FlagNames())


def turns_of(record: Any) -> list[tuple[str, str]]:
    """Return the roles and contents that the suggested example makes of a record."""
    text = suggested(record)
    head, code = text.split("\n", 1)
    assert head.startswith(
        "try: --transform convert.py:to_chat  # with this function in convert.py"
    )
    assert ("edited at the marked places" in head) == ("# EDIT:" in code)
    made = run(textwrap.dedent(code), record)
    return [(message["role"], message["content"]) for message in made["messages"]]


GLAIVE = {
    "system": "SYSTEM: You may call -\n{}",
    "chat": "USER: Hi, time: now\n\n\nASSISTANT: Hello <|endoftext|>\n\n\n"
    "FUNCTION RESPONSE: 1\n\n\nASSISTANT: So. <|endoftext|>",
}
MOSS_TURN = {
    "Human": "ask",
    "Inner Thoughts": "hm",
    "Commands": "None",
    "Tool Responses": "",
    "MOSS": "reply",
}
SQUAD = {
    "id": "5733",
    "title": "A title of several words",
    "context": "A long passage.",
    "question": "ask",
    "answers": {"text": ["reply", "other"], "answer_start": [3, 5]},
}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            GLAIVE,
            [
                ("system", "You may call -\n{}"),
                ("user", "Hi, time: now"),
                ("assistant", "Hello"),
                ("tool", "1"),
                ("assistant", "So."),
            ],
        ),
        (
            {"log": "A chat. USER: ask ASSISTANT: reply, note: x USER: more ASSISTANT: yes"},
            [
                ("system", "A chat."),
                ("user", "ask"),
                ("assistant", "reply, note: x"),
                ("user", "more"),
                ("assistant", "yes"),
            ],
        ),
        (
            {"chosen": "\n\nHuman: ask\n\nAssistant: reply", "rejected": "\n\nHuman: ask"},
            [("user", "ask"), ("assistant", "reply")],
        ),
        (
            {"example": "### Instruction: ask\n### Response: reply"},
            [("user", "ask"), ("assistant", "reply")],
        ),
        (
            {"request": {"messages": [U]}, "response": {"choices": [{"message": A}]}},
            [("user", "ask"), ("assistant", "reply")],
        ),
        (
            {"request": {"messages": [U], "model": "m"}, "response": {"id": "1", "text": "reply"}},
            [("user", "ask"), ("assistant", "reply")],
        ),
        (
            {"request": {"prompt": "ask", "n": 1}, "response": {"id": "1", "text": "reply"}},
            [("user", "ask"), ("assistant", "reply")],
        ),
        ({"log": {"messages": [U, A]}, "id": "x"}, [("user", "ask"), ("assistant", "reply")]),
        (
            {"meta_instruction": "Rules.", "num_turns": 2, "chat": {"turn_1": MOSS_TURN}},
            [("system", "Rules."), ("user", "ask"), ("assistant", "reply")],
        ),
        (
            {"chat": [{"human_says": "ask", "bot_says": "reply"}] * 2},
            [("user", "ask"), ("assistant", "reply")] * 2,
        ),
        (
            {
                "utterances": [
                    {"who": "CLIENT", "line": "ask"},
                    {"who": "assistant", "line": "reply"},
                ]
            },
            [("user", "ask"), ("assistant", "reply")],
        ),
        (SQUAD, [("user", "A long passage.\n\nask"), ("assistant", "reply")]),
        (
            {**SQUAD, "answers": {"text": [], "answer_start": []}},
            [("user", "A long passage.\n\nask"), ("assistant", "...")],
        ),
        (
            {"question": "ask", "choices": ["reply", "other"], "answer": 0},
            [("user", "ask\nreply\nother"), ("assistant", "reply")],
        ),
        (
            {"question": "ask", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "key": "A"},
            [("user", "ask\nx\ny"), ("assistant", "A")],
        ),
        (
            {"prompt": {"text": "ask", "replies": [{"text": "reply", "role": "assistant"}]}},
            [("user", "ask"), ("assistant", "reply")],
        ),
        (
            {"input": "ask", "content": "reply", "reasoning_content": "I think.", "repo": "a b c"},
            [("user", "ask"), ("assistant", "reply")],
        ),
        (
            {"a": "id7", "b": "What is the capital?", "c": "It is called Paris."},
            [("user", "What is the capital?"), ("assistant", "It is called Paris.")],
        ),
        (
            {"question_type": "one of many", "question": "ask", "choices": ["x"], "answer": 7.5},
            [("user", "ask\nx"), ("assistant", "7.5")],
        ),
        ({}, [("user", "..."), ("assistant", "...")]),
    ],
)
def test_the_example_reads_the_request_and_the_answer(record: Any, expected: Any) -> None:
    assert turns_of(record) == expected


RESPONSE_ITEMS = [
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "ask"}]},
    {"type": "function_call", "call_id": "c", "name": "look", "arguments": '{"at": "it"}'},
    {"type": "function_call_output", "call_id": "c", "output": "3 m high"},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "so"}]},
]
HISTORY = [{"role": "USER", "message": "first"}, {"role": "CHATBOT", "message": "second"}]
TASK_TURNS = [
    {"speaker": "USER", "utterance": "ask"},
    {"speaker": "SYSTEM", "utterance": "reply"},
    {"speaker": "USER", "utterance": "more"},
    {"speaker": "SYSTEM", "utterance": "yes"},
]


def read_suggested(record: Any) -> list[tuple[str, str]]:
    """Return the roles and contents that are read from what the example makes of a record."""
    code = textwrap.dedent(suggested(record).split("\n", 1)[1])
    made = run(code, record)
    example = read_record(made, 0, "messages", RecordOptions())
    return [(m["role"], m.get("content") or str(m["tool_calls"])) for m in example.messages or []]


@pytest.mark.parametrize("key", ["chat_history", "history", "turns"])
def test_the_request_and_the_answer_after_earlier_turns_are_kept(key: str) -> None:
    request = "question" if key == "turns" else "message"
    record = {request: "ask me", key: HISTORY, "response": "so it is"}
    assert read_suggested(record) == [
        *(("user", "first"), ("assistant", "second")),
        *(("user", "ask me"), ("assistant", "so it is")),
    ]


def test_an_instruction_for_several_pairs_is_kept_with_each_of_them() -> None:
    pairs = [{"input": "one", "output": "eins"}, {"input": "", "output": "zwei"}]
    record = {"id": "7", "instruction": "Translate.", "instances": pairs}
    assert suggested(record).startswith("try: ")
    code = textwrap.dedent(suggested(record).split("\n", 1)[1])
    made = run(code, record)
    assert [[(m["role"], m["content"]) for m in each["messages"]] for each in made] == [
        [("user", "Translate.\n\none"), ("assistant", "eins")],
        [("user", "Translate."), ("assistant", "zwei")],
    ]
    # Of a single pair, too: a map to messages would lose the instruction.
    assert "--transform" in suggested({**record, "instances": pairs[:1]})


@pytest.mark.parametrize("key", ["instruction", "context"])
def test_a_text_for_all_turns_is_the_system_prompt_with_a_mark(key: str) -> None:
    turns = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "so"}]
    record = {key: "Be brief and kind.", "talk": turns}
    assert turns_of(record)[0] == ("system", "Be brief and kind.")
    assert "# EDIT: is this the system prompt?" in suggested(record)
    # The first request alongside the turns is not lost by a map.
    assert "--map talk=messages" in suggested({"prompt": "ask", "talk": turns})


def test_the_choices_of_an_object_are_shown_and_the_chosen_one_is_the_answer() -> None:
    record = {"question": "ask?", "options": {"A": "one", "B": "two"}, "answer_idx": "B"}
    assert turns_of(record) == [("user", "ask?\nA. one\nB. two"), ("assistant", "two")]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_text_that_ends_with_the_mark_of_the_answer_receives_it(number: int) -> None:
    record = {"prompt": "\n\nHuman: ask\n\nAssistant: ", "answers": [{"answer": "A b"}] * number}
    answer = "A b" if number else "..."
    assert turns_of(record) == [("user", "ask"), ("assistant", answer)]
    assert "# EDIT:" in suggested(record)


def test_a_system_in_place_of_the_assistant_is_one_with_a_mark() -> None:
    expected = [("user", "ask"), ("assistant", "reply"), ("user", "more"), ("assistant", "yes")]
    for turns in (TASK_TURNS, [{**t, "text": t["utterance"]} for t in TASK_TURNS]):
        record = {"dialogue_id": "7", "utterances": turns}
        assert turns_of(record) == expected
        assert "# EDIT: who is the assistant?" in suggested(record)


def test_items_of_the_responses_api_become_messages_and_calls() -> None:
    turns = read_suggested({"input": RESPONSE_ITEMS})
    assert [role for role, _ in turns] == ["user", "assistant", "tool", "assistant"]
    assert "'look'" in turns[1][1]
    assert '{"at": "it"}' in turns[1][1]
    assert [content for role, content in turns if role != "assistant"] == ["ask", "3 m high"]
    assert turns[-1] == ("assistant", "so")


def test_turns_in_columns_become_messages() -> None:
    columns = {"role": ["user", "assistant"], "content": ["ask", "so"]}
    assert turns_of({"log": columns}) == [("user", "ask"), ("assistant", "so")]
    assert turns_of({"messages": columns, "text": "a b"}) == [("user", "ask"), ("assistant", "so")]


def test_all_columns_of_turns_are_kept() -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    columns = {
        "role": ["user", "assistant", "tool", "assistant"],
        "content": ["ask", "", "3 m", "so"],
        "tool_calls": [None, [call], None, None],
    }
    turns = read_suggested({"messages": columns})
    assert [role for role, _ in turns] == columns["role"]
    assert "'look'" in turns[1][1]


@pytest.mark.parametrize("value", ["", "In it."])
def test_the_input_of_an_instruction_is_in_the_map(value: str) -> None:
    record = {"Instruction": "Do it.", "Input": value, "Output": "Done."}
    flags = "Instruction=instruction,Output=output,Input=input"
    assert suggested(record) == f"try: --map {flags}"


def test_what_is_uncertain_is_marked_and_all_keys_are_listed() -> None:
    text = suggested({"a": "x y z", "b": "u v w", "meta": {"k": 1}, "n": 7, "none": None})
    assert "# the keys of the first record: 'a' (str), 'b' (str), 'meta' (dict with 'k')" in text
    assert "# not used: 'meta', 'n'\n" in text
    assert "record['a']},  # EDIT: is this the request?" in text
    assert "record['b']},  # EDIT: is this the answer?" in text
    assert "# EDIT: this is only the first of 2" in suggested(SQUAD)
    assert "EDIT" not in suggested(GLAIVE)
    moss = suggested({"chat": {"turn_1": MOSS_TURN}})
    assert "# not used: 'Commands', 'Tool Responses'\n" in moss
    assert "turn['MOSS'], \"reasoning_content\": turn['Inner Thoughts']}" in moss


def test_the_names_of_other_parts_are_in_the_map() -> None:
    record = {"Question": "a", "Complex_CoT": "Hm, so it is.", "Response": "b", "cot_type": "math"}
    assert suggested(record) == (
        "try: --map Question=instruction,Response=output,Complex_CoT=reasoning"
    )
    record = {
        "user_name": "bob",
        "user_input": "a",
        "model_output": "b",
        "system_text": "Be so kind.",
    }
    assert suggested(record) == (
        "try: --map user_input=instruction,model_output=output,system_text=system"
    )


def test_the_example_is_for_the_record_before_keys_are_renamed(
    records: Any, tokenizer_dir: Path, tmp_path: Path
) -> None:
    path = records([{"first": "x y z", "second": "u v w"}])
    with pytest.raises(FormatError) as caught:
        build(path, tokenizer=tokenizer_dir, output=tmp_path / "o", map="first=third")
    assert "record['first']" in str(caught.value)


@needs_shared
@pytest.mark.parametrize("shape", shapes(), ids=lambda shape: shape["shape"])
def test_the_example_runs_on_every_public_shape(shape: Any) -> None:
    for record in shape["records"]:
        if isinstance(record, dict):
            assert run(transform_example(record, RecordOptions()), record)["messages"]


KEYS = st.sampled_from(
    ["question", "answers", "text", "chat", "choices", "answer", "messages", "role", "content"]
) | st.text(st.characters(exclude_categories=("Cs",)), max_size=6)
TEXTS = st.sampled_from(["USER: a\nASSISTANT: b", "a b c", "user", "assistant", 'it\'s "x"\n', ""])
VALUES = st.recursive(
    TEXTS | st.none() | st.booleans() | st.integers(-3, 3) | st.floats(0, 1),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(record=st.dictionaries(KEYS, VALUES, max_size=4))
def test_the_example_runs_on_any_record(record: Any) -> None:
    before = json.dumps(record)
    code = transform_example(record, RecordOptions())
    assert json.dumps(record) == before
    for message in run(code, record)["messages"]:
        assert isinstance(message, dict)
    assert re.search(r"^def to_chat\(record\):$", code, re.MULTILINE)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            {"question": "ask", "answer": {"$opaque": "bytes"}},
            [("user", "ask"), ("assistant", "...")],
        ),
        (
            {"question": {"$opaque": "list of bytes"}, "answer": "reply"},
            [("user", "..."), ("assistant", "reply")],
        ),
    ],
)
def test_a_column_of_bytes_is_named_and_not_used(record: Any, expected: Any) -> None:
    assert turns_of(record) == expected
    text = suggested(record)
    assert "$opaque" not in text
    assert re.search(r"'(answer|question)' \((list of )?bytes, not text\)", text)
    assert re.search(r"# EDIT: '(answer|question)' holds (list of )?bytes, not text; write", text)


@pytest.mark.parametrize(
    "record",
    [
        {"input": ["q1", "q2"], "output": ["a1", "a2"]},
        {"question": "ask", "context": ["one part", "another part"], "answer": {"text": ["a"]}},
    ],
)
def test_the_first_of_several_texts_is_marked(record: Any) -> None:
    (line,) = [line for line in suggested(record).split("\n") if '"user"' in line]
    assert line.endswith("# EDIT: this is only the first of 2")


@pytest.mark.parametrize("key", [" answer", "answer ", "answer=text", "answer, short"])
def test_a_key_that_map_cannot_express_needs_a_transform(key: str) -> None:
    assert turns_of({"question": "ask", key: "reply"}) == [("user", "ask"), ("assistant", "reply")]


def test_a_conversation_under_a_key_that_map_cannot_express_needs_a_transform() -> None:
    assert turns_of({" log": [U, A]}) == [("user", "ask"), ("assistant", "reply")]
