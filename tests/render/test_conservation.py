"""The check for omissions, compared with sentinels that transformers renders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.conservation import compare, templates_of_trl
from sftprep.render.omissions.check import NO_OMISSIONS, ConservationCheck, Conversation, Omissions


def chatml(messages: Any) -> str:
    """Render roles and contents, and nothing else."""
    return "".join(f"<|{m['role']}|>{(m['content'] or '').strip()}\n" for m in messages)


def check_by(render: Callable[[Any], str]) -> ConservationCheck:
    return ConservationCheck(lambda conversation: render(conversation.messages))


def find_in(messages: list[dict[str, Any]]) -> Omissions:
    return check_by(chatml).find_omissions(Conversation(messages), chatml(messages))


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_the_check_agrees_with_transformers_on_the_templates_of_trl(step: int) -> None:
    templates = dict(sorted(templates_of_trl().items())[::step])
    outcome = compare(templates)
    assert outcome.with_omissions > 1000 / step
    assert outcome.differences == []


contents = st.text(max_size=12) | st.sampled_from(["yes", "Yes, of course it is", "a\nb", " x "])


@given(st.lists(contents, min_size=1, max_size=8))
def test_whatever_is_written_is_no_omission(values: list[str]) -> None:
    messages = [{"role": "user", "content": value} for value in values]
    assert find_in(messages) == NO_OMISSIONS


@given(st.lists(contents, min_size=2, max_size=8), st.data())
def test_a_turn_that_is_left_out_is_an_omission(values: list[str], data: Any) -> None:
    roles = ["user"] * len(values)
    dropped = data.draw(st.integers(0, len(values) - 1))
    roles[dropped] = "hidden"
    messages = [{"role": r, "content": v} for r, v in zip(roles, values, strict=True)]

    def render(rows: Any) -> str:
        return chatml([row for row in rows if row["role"] != "hidden"])

    found = check_by(render).find_omissions(Conversation(messages), render(messages)).kinds
    assert found == ({"message_not_shown"} if values[dropped].strip() else set())


def test_a_long_conversation_whose_template_refuses_sentinels_has_no_false_omission() -> None:
    messages = [
        {"role": "user", "content": f"Message number {number} of many."} for number in range(3000)
    ]
    messages[1500]["content"] = "  stripped  "

    def render(rows: Any) -> str:
        if "sentinel" in str(rows[0]) or "zqx" in str(rows[0]):
            raise ValueError("refused")
        return chatml(rows) + "x" * 100_000

    check = check_by(render)
    assert check.find_omissions(Conversation(messages), render(messages)) == NO_OMISSIONS
    text = render(messages[:2000])
    assert check.find_omissions(Conversation(messages), text).kinds == {"message_not_shown"}


def test_a_text_before_the_reasoning_is_a_part_of_the_message() -> None:
    content = "Of course I will.<think>Two and two boats.</think>Four of them."
    message = {"role": "assistant", "content": content}

    def render(rows: Any) -> str:
        return "".join("<think>" + row["content"].partition("<think>")[2] for row in rows)

    check = check_by(render)
    found = check.find_omissions(Conversation([message]), render([message]))
    assert found.kinds == {"message_not_shown"}


def test_reasoning_of_the_last_turn_is_rejected_and_earlier_reasoning_is_not() -> None:
    question = {"role": "user", "content": "How many boats are there?"}
    answer = {"role": "assistant", "content": "Four of them.", "reasoning": "Two and two boats."}
    last = find_in([question, answer])
    assert last.kinds == {"reasoning_not_shown"}
    assert last.rejectable == {"reasoning_not_shown"}
    earlier = find_in([question, answer, question, {"role": "assistant", "content": "Still four."}])
    assert earlier.kinds == {"reasoning_not_shown"}
    assert not earlier.rejectable


def test_a_missing_call_is_not_counted_again_for_its_arguments() -> None:
    call = {"function": {"name": "sail", "arguments": {"to": "Roter Sand"}}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert find_in([message]).kinds == {"call_not_shown"}


@pytest.mark.parametrize("value", [True, False, None, {}, [], ""])
def test_values_without_text_are_not_searched_for(value: Any) -> None:
    call = {"function": {"name": "sail", "arguments": {"now": value}}}
    message = {"role": "assistant", "content": "sail away", "tool_calls": [call]}

    def render(rows: Any) -> str:
        return chatml(rows) + rows[0]["tool_calls"][0]["function"]["name"]

    text = render([message])
    assert check_by(render).find_omissions(Conversation([message]), text) == NO_OMISSIONS


def test_pieces_that_are_the_contents_need_no_search() -> None:
    messages = [
        {"role": "user", "content": "Where is it?"},
        {"role": "assistant", "content": "Here"},
    ]
    pieces = ["<|user|>", messages[0]["content"], "\n", messages[1]["content"]]
    check = check_by(chatml)
    assert check.find_omissions(Conversation(messages), "not even the text", pieces) == NO_OMISSIONS


def call_of(name: str, **keys: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": {}}, **keys}


def result_of(name: str, **keys: Any) -> dict[str, Any]:
    return {"role": "tool", "name": name, "content": "It rains.", **keys}


F, G = call_of("f", id="c1"), call_of("g", id="c2")
TWO = [call_of("f"), call_of("g")]


@pytest.mark.parametrize(
    ("calls", "results", "is_missing"),
    [
        ([F], [result_of("f")], False),
        ([F], [result_of("zzz")], True),
        (TWO, [result_of("f"), result_of("g")], False),
        (TWO, [result_of("g"), result_of("f")], True),
        ([F, G], [result_of("g", tool_call_id="c2"), result_of("f", tool_call_id="c1")], False),
        ([F, G], [result_of("g", tool_call_id="c2"), result_of("f")], False),
        ([F, G], [result_of("g", tool_call_id="c1")], True),
        ([], [result_of("zzz")], True),
        ([], [result_of("user")], False),  # the text has it
    ],
)
@pytest.mark.parametrize("shows_names", [False, True])
def test_the_name_of_a_result_is_shown_or_that_of_its_call(
    calls: list[Any], results: list[Any], is_missing: bool, shows_names: bool
) -> None:
    def render(rows: Any) -> str:
        return "".join(
            f"<|{row['role']}|>{row['content']}"
            + "".join(call["function"]["name"] for call in row.get("tool_calls", ()))
            + (row.get("name", "") if shows_names else "")
            for row in rows
        )

    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", **({"tool_calls": calls} if calls else {})},
        *results,
    ]
    found = check_by(render).find_omissions(Conversation(messages), render(messages))
    assert found.kinds == ({"name_not_shown"} if is_missing and not shows_names else set())
    assert not found.rejectable
