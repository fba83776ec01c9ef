"""Contents that are found among the pieces of a rendering."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from sftprep.render.omissions.written_contents import WrittenContents

Messages = list[dict[str, Any]]


def to_messages(*contents: Any) -> Messages:
    roles = ["user", "assistant"] * len(contents)
    return [
        {"role": role, "content": content} for role, content in zip(roles, contents, strict=False)
    ]


def copy_of(text: str) -> str:
    return "".join([*text])


def write(messages: Messages) -> list[str]:
    """Return what a template with stripped contents writes, in pieces."""
    pieces = []
    for message in messages:
        pieces += ["<", message["role"], ">", message["content"].strip(), "</>"]
    return pieces


def without_answers(messages: Messages) -> list[str]:
    """Return the same without the contents of the assistant."""
    pieces = []
    for message in messages:
        pieces += ["<", message["role"], ">"]
        pieces += [message["content"]] if message["role"] == "user" else []
        pieces += ["</>"]
    return pieces


def cannot_render(messages: Messages) -> Sequence[str]:
    return ()


@pytest.fixture
def written() -> WrittenContents:
    return WrittenContents(cannot_render)


def test_contents_are_found_at_new_positions_after_those_of_the_last_conversation(
    written: WrittenContents,
) -> None:
    first, second = copy_of("a question"), copy_of("an answer")
    messages = to_messages(first, second)
    assert written.has_all(messages, ["<", first, ">", second, "", ""])
    assert written.has_all(messages, ["<", first, ">", second, "", ""])
    assert written.has_all(messages, ["<", ">", first, "", "", second])
    assert written.has_all(messages, ["<", first, ">", second, "", ""])
    assert not written.has_all(messages, ["<", second, ">", first, "", ""])
    assert not written.has_all(messages, ["<", first, ">", "", "", ""])


def test_equal_strings_in_unknown_places_are_not_contents(written: WrittenContents) -> None:
    question, answer = copy_of("user"), copy_of("an answer")
    assert written.has_all(to_messages(question, answer), [question, answer])
    assert not written.has_all(to_messages(question, answer), ["<", copy_of("user"), answer])


@pytest.mark.parametrize("short", ["A", " A", "yes ", "\nlonger than a word\n"])
def test_short_and_stripped_contents_are_proven_by_their_places(
    written: WrittenContents, short: str
) -> None:
    messages = to_messages("a question", short)
    assert not written.has_all(messages, write(messages))  # no place is known
    long = to_messages("a question", "an answer", "a question", "an answer")
    assert written.has_all(long, write(long))
    assert written.has_all(messages, write(messages))
    assert not written.has_all(messages, write(to_messages("a question", "B")))
    both = to_messages(short, short, short, short)
    assert written.has_all(both, write(both))
    assert not written.has_all(both, write(both[:2]))
    assert not written.has_all(both[:2], write(both))


def test_places_are_learned_from_a_probe() -> None:
    written = WrittenContents(write)
    messages = to_messages("a question", "A", "another question", "B", "C", "D", "E", "F", "G")
    assert written.has_all(messages, write(messages))
    assert not written.has_all(messages, [piece for piece in write(messages) if piece != "B"])


@pytest.mark.parametrize("render", [write, without_answers])
def test_a_dropped_content_that_equals_the_next_piece_is_not_found(
    render: Callable[[Messages], list[str]],
) -> None:
    written = WrittenContents(render)
    long = to_messages("a question", "an answer", "a question", "an answer")
    written.has_all(long, write(long))
    end = copy_of("</>")
    for contents in ([end], ["a question", end], ["a question", end, "a question", end]):
        messages = to_messages(*contents)
        assert written.has_all(messages, write(messages))
        if len(messages) > 1:
            assert not written.has_all(messages, without_answers(messages))


@pytest.mark.parametrize("content", [None, 5, "", " ", ["a question"], {"text": "a question"}])
def test_other_contents_are_left_to_the_check(written: WrittenContents, content: Any) -> None:
    text = copy_of("a question")
    assert written.has_all(to_messages(text, text), [text, text])
    assert not written.has_all(to_messages(text, content), [text, text])
    assert written.has_all(to_messages(text), [text])
