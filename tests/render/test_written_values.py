"""The values that a template converted to JSON and wrote, as it is or within a longer string."""

from __future__ import annotations

import json

import pytest

from sftprep.render.omissions import written_values
from sftprep.render.omissions.written_values import WrittenValues


def written(values: list[dict[str, int]], text: str) -> list[bool]:
    found = WrittenValues(text, (), [(value, json.dumps(value)) for value in values])
    return [found.take(value) for value in values]


def test_json_is_found_in_the_order_of_its_conversion() -> None:
    values = [{"number": number} for number in range(100)]
    texts = [*map(json.dumps, values[:90])]
    assert written(values, "\n".join(texts)) == [True] * 90 + [False] * 10
    # Not known to be written, so that it is searched for.
    assert not all(written(values, "\n".join(reversed(texts))))


def test_json_that_the_text_may_have_by_chance_is_not_known_to_be_written() -> None:
    value, strings = {"number": 1}, ["the number", '{"number": 1}']
    text = "\n".join([*strings, json.dumps(value)])
    pairs = [(value, json.dumps(value))]
    assert WrittenValues(text, (), pairs, "the number").take(value)
    assert not WrittenValues(text, (), pairs, "\0".join(strings)).take(value)


def test_json_of_a_string_is_written_only_if_it_is_a_piece() -> None:
    value = "the number"
    json_text = json.dumps(value)
    for pieces in ((), (json_text,)):
        found = WrittenValues(f"<{json_text}>", pieces, [(value, json_text)])
        assert found.take(value) == bool(pieces)


def test_the_number_of_searches_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [{"number": number} for number in range(10)]
    text = json.dumps(values[0])
    monkeypatch.setattr(written_values, "_MOST_WORK", 3 * len(text))
    assert not any(written(values, text))
    assert written(values[:3], text) == [True, False, False]
