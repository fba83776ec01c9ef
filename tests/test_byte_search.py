"""The search for words in lines of JSON."""

from __future__ import annotations

import json
from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from sftprep.core.byte_search import ByteSearcher

words = st.lists(st.sampled_from(["<|end|>", "<s>", "</s>", "<|", "é#", "[\nX]"]), min_size=1)
pieces = st.sampled_from(
    ["<|end|>", "<s>", "<", "|end|>", "</s", ">", "é", "#", "[\nX]", "a", "\\"]
)
texts = st.lists(pieces, max_size=4).map("".join)


def to_line(strings: list[str], spelling: str) -> bytes:
    if spelling == "escaped":
        value = json.dumps(strings)
        return value.replace("<", "\\u003c").replace("/", "\\/").encode()
    if spelling == "nested":
        return json.dumps({"calls": json.dumps(strings)}).encode()
    return json.dumps(strings, ensure_ascii=False).encode()


@given(
    words,
    st.lists(st.tuples(st.lists(texts, max_size=3), st.sampled_from(["", "escaped", "nested"]))),
)
@example(["<s>"], [(["a"], ""), (["<s>"], ""), (["b", "<", "s>"], "")])
def test_every_line_that_may_contain_a_word_is_found(words, lines):
    data = b"\n".join(to_line(*line) for line in lines)
    found = ByteSearcher(data).find_lines(words)
    for number, (strings, _) in enumerate(lines):
        joined = [*strings, *("".join(pair) for pair in pairwise(strings))]
        if any(word in text for word in words for text in joined):
            assert number in found


def test_other_lines_are_not_found():
    lines = [b'{"text": "so it goes"}', b'{"text": "a <s> b"}', b'{"text": "a < b"}', b""]
    assert ByteSearcher(b"\n".join(lines)).find_lines(["<s>", "</s>"]) == {1}
    assert ByteSearcher(b"").find_lines(["<s>"]) == set()
