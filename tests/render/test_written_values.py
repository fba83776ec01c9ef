"""The values that a template converted to JSON and wrote, as it is or within a longer string."""

from __future__ import annotations

import json
import random

import pytest

from sftprep.render.omissions import written_values
from sftprep.render.omissions.written_values import WrittenValues


def written(values: list[dict[str, int]], text: str) -> list[bool]:
    found = WrittenValues(text, (), [(value, json.dumps(value)) for value in values])
    return [found.take(value) for value in values]


@pytest.mark.parametrize("is_shuffled", [False, True])
def test_json_is_found_in_any_order(is_shuffled: bool) -> None:
    values = [{"number": number} for number in range(100)]
    texts = [*map(json.dumps, values[:90])]
    if is_shuffled:
        random.Random(1).shuffle(texts)
    assert written(values, "\n".join(texts)) == [True] * 90 + [False] * 10


def test_the_number_of_searches_of_the_whole_text_is_limited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = [{"number": number} for number in range(10)]
    text = json.dumps(values[9])
    monkeypatch.setattr(written_values, "_MOST_WORK", 3 * len(text))
    assert not any(written(values, text))  # not known to be written, so that it is searched for
    assert written(values[7:], text) == [False, False, True]
