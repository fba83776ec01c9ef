"""Contents that are found among the pieces of a rendering."""

from __future__ import annotations

from sftprep.render.unchanged_contents import UnchangedContents


def to_messages(*contents):
    roles = ["user", "assistant"] * len(contents)
    return [
        {"role": role, "content": content} for role, content in zip(roles, contents, strict=False)
    ]


def copy_of(text):
    return "".join([*text])


def test_contents_are_found_at_new_positions_after_those_of_the_last_conversation():
    unchanged = UnchangedContents()
    first, second = copy_of("a question"), copy_of("an answer")
    messages = to_messages(first, second)
    assert unchanged.has_all(messages, ["<", first, ">", second, "", ""])
    assert unchanged.has_all(messages, ["<", first, ">", second, "", ""])
    assert unchanged.has_all(messages, ["<", ">", first, "", "", second])
    assert unchanged.has_all(messages, ["<", first, ">", second, "", ""])
    assert not unchanged.has_all(messages, ["<", second, ">", first, "", ""])
    assert not unchanged.has_all(messages, ["<", first, ">", "", "", ""])


def test_equal_strings_of_the_template_are_not_contents():
    unchanged = UnchangedContents()
    question, answer = copy_of("user"), copy_of("an answer")
    assert unchanged.has_all(to_messages(question, answer), [question, answer])
    assert not unchanged.has_all(to_messages(question, answer), [copy_of("user"), answer])


def test_short_contents_are_never_certain():
    unchanged = UnchangedContents()
    texts = copy_of("a question"), copy_of("an answer")
    assert unchanged.has_all(to_messages(*texts), [*texts])
    for short in ("", "a"):
        assert not unchanged.has_all(to_messages(texts[0], short), [texts[0], short])


def test_other_contents_are_left_to_the_check():
    unchanged = UnchangedContents()
    text = copy_of("a question")
    assert unchanged.has_all(to_messages(text, text), [text, text])
    for content in (None, 5, ["a question"], {"text": text}):
        assert not unchanged.has_all(to_messages(text, content), [text, text])
    assert not unchanged.has_all([{"role": "user", "content": text, "name": "x"}], [text])
    assert unchanged.has_all(to_messages(text), [text])
