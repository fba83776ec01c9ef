"""Conversations filled as JSON writes them: whatever escapes, blanks and tokens their contents are
written with."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftprep import build
from sftprep.config import BuildConfig
from sftprep.engine import build as build_module
from sftprep.engine import chats, passes
from sftprep.engine.prepare import Preparer
from sftprep.engine.recipe import Recipe
from sftprep.engine.setup import prepare_recipe
from sftprep.lookup import Letters
from sftprep.ragged import Pieces
from sftprep.sources import partition
from sftprep.tokenize.beside import Asking
from sftprep.tokenize.between import Between
from sftprep.tokenize.fast import FastEncoder
from sftprep.tokenize.spot import SpotChecks
from sftprep.tokenize.tokens import Mismatch, Tokens
from tests.engine.both_ways import both_ways
from tests.engine.builds import content
from tests.tokenize.made import CHATML, START, STOP, byte_level, live

TEMPLATES = {
    "chatml": CHATML,
    "trimmed": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>{%"
        " endfor %}"
    ),
    "left": (
        "{% for m in messages %}<|im_start|>{{ m.content.lstrip('\\n') }}<|im_end|>{% endfor %}"
    ),
    "right": (
        "{% for m in messages %}{{ m.role }}: {{ m.content.rstrip() }}<|im_end|>\n{% endfor %}"
    ),
    "other letters": (
        "{% for m in messages %}<|im_start|>{{ m.content.strip('ab') }}<|im_end|>{% endfor %}"
    ),
    "no tokens": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "digits beside": "{% for m in messages %}0a{{ m.content }}00<|im_end|>{% endfor %}",
    "nothing between": "{% for m in messages %}{{ m.content }}{% endfor %}",
    "marked": (
        "{% for m in messages %}<|im_start|>{% generation %}{{ m.content }}<|im_end|>{%"
        " endgeneration %}{% endfor %}"
    ),
}
WRITTEN = [
    "a",
    "b",
    " ",
    "0",
    "\\n",
    "\\t",
    "\\\\",
    '\\"',
    "\\/",
    "\\u0041",
    "\\u0020",
    "\\u003c",
    "\\ud83d\\ude00",
]
WRITTEN += ["中", "\u3000", STOP, START, "\\u003c|im_end|>", "e\u0301", "\u1e135", "\\u0000"]
BROKEN = ["\\u", "\\u0", "\\u00", "\\u004", "\\ud83d", "\\ude00", "\\x", "\\ud83d\\u"]
"""What no text ends with, and mostly what is after it makes it none."""

sound = st.lists(st.sampled_from(WRITTEN), max_size=4).map("".join)
broken = st.lists(st.sampled_from([*WRITTEN, *BROKEN]), max_size=4).map("".join)


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recipe]:
    made = {}
    for name, template in TEMPLATES.items():
        folder = tmp_path_factory.mktemp("tokenizer")
        live(
            byte_level(nfc=True, gpt4=True), eos_token=STOP, chat_template=template
        ).save_pretrained(folder)
        made[name] = prepare_recipe(
            BuildConfig.of(inputs="x", tokenizer=str(folder), output="o", max_length=4096)
        )[0]
    return made


def line(contents: list[str]) -> bytes:
    turns = [
        f'{{"role": "{("user", "assistant")[k % 2]}", "content": "{text}"}}'
        for k, text in enumerate(contents)
    ]
    return f'{{"messages": [{", ".join(turns)}]}}\n'.encode()


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_contents_as_they_are_written(
    recipes: dict[str, Recipe], name: str, data: st.DataObject
) -> None:
    kinds = st.sampled_from([sound, sound, broken]).flatmap(
        lambda kind: st.lists(kind, min_size=1, max_size=3)
    )
    conversations = data.draw(st.lists(kinds, min_size=1, max_size=8))
    both_ways(b"".join(map(line, conversations * 2)), "messages", recipes[name], sample=2)


def test_an_escape_that_its_neighbour_would_complete(recipes: dict[str, Recipe]) -> None:
    data = line(["x\\u0", "a"]) * 3 + line(["x", "a"]) * 3 + line(["\\ud83d", "\\ude00"]) * 2
    got, _, lines = both_ways(data, "messages", recipes["digits beside"])
    assert lines == [3, 4, 5]
    assert sorted(record.line for record in got.rejected) == [0, 1, 2, 6, 7]


@pytest.mark.parametrize(
    ("name", "framed"),
    [("chatml", True), ("trimmed", True), ("no tokens", False), ("marked", True)],
)
def test_ordinary_chats_are_framed(recipes: dict[str, Recipe], name: str, framed: bool) -> None:
    data = line(["Hello there", "Hi!"]) * 5 + line(["one", "two", "three"]) * 4 + line(["alone"])
    texts = Preparer(recipes[name], threads=False)._columns.texts(
        Letters(data), "messages", Counter()
    )
    assert sum(map(len, texts.framed)) == (10 if framed else 0)
    assert len(texts.lines) == 10
    both_ways(data, "messages", recipes[name])


def test_shapes_beyond_number_are_forgotten(
    recipes: dict[str, Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chats, "_MOST_SHAPES", 3)
    preparer, plain = (Preparer(recipes["chatml"], threads=False) for _ in range(2))
    plain._columns._idle = True
    for first in (1, 3, 2, 5):
        data = b"".join(
            line(["a", "b", "c", "d", "e"][:count])
            for count in (first, first + 1, first, 1)
            for _ in range(2)
        )
        got, want = (each.prepare(data, "messages", seed=0) for each in (preparer, plain))
        assert np.array_equal(got.input_ids, want.input_ids)
        assert preparer._columns.texts(Letters(data), "messages", Counter()).lines
    # As many as fit, of a partition with more.
    data = b"".join(line(["a"] * count) for count in (1, 2, 3, 4, 5, 1, 2, 3, 4, 5))
    lines = preparer._columns.texts(Letters(data), "messages", Counter()).lines
    assert len(lines) == 6
    assert len({number % 5 for number in lines}) == 3
    assert np.array_equal(
        preparer.prepare(data, "messages", seed=0).input_ids,
        plain.prepare(data, "messages", seed=0).input_ids,
    )


def test_weights_beside_framed_conversations(recipes: dict[str, Recipe]) -> None:
    heavy = {"role": "assistant", "content": "b", "weight": 0.5}
    other = json.dumps({"messages": [{"role": "user", "content": "a"}, heavy]}).encode() + b"\n"
    got, _, lines = both_ways(
        line(["a", "b"]) * 3 + other + line(["a", "b"]), "messages", recipes["chatml"]
    )
    assert lines == [0, 1, 2, 4]
    assert got.loss_weights is not None
    assert set(got.loss_weights.tolist()) == {0.0, 0.5, 1.0}


@pytest.mark.parametrize("answer", ["wrong ids", "a look at each"])
def test_frames_that_cannot_be_trusted_are_done_without(
    recipes: dict[str, Recipe], monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    whole = FastEncoder.encode_parts

    def spoilt(self: FastEncoder, joined: str, between: Between, count: int) -> Any:
        if answer != "wrong ids":
            return None
        found = whole(self, joined, between, count)
        assert found is not None
        return Pieces(found.values ^ 1, found.first, found.last)

    monkeypatch.setattr(FastEncoder, "encode_parts", spoilt)
    got, _, _ = both_ways(
        line(["Hello there", "Hi!"]) * 5 + line(["alone"]), "messages", recipes["chatml"], sample=2
    )
    assert got.counts.get("warnings.encoder_failed_over", 0) == (answer == "wrong ids")


def test_a_partition_found_wrong_after_others_were_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live(byte_level(nfc=True, gpt4=True), eos_token=STOP, chat_template=CHATML).save_pretrained(
        tmp_path / "tokenizer"
    )
    (tmp_path / "rows.jsonl").write_bytes(
        b"".join(line([f"question {k}", "answer"]) for k in range(400))
    )
    monkeypatch.setattr(build_module, "cut", lambda inputs: partition.cut(inputs, 4_000))
    monkeypatch.setattr(passes, "_OPEN_SECONDS", 1e9)
    order: list[str] = []
    whole, answer = FastEncoder.encode_parts, SpotChecks.mismatch

    def spoilt(self: FastEncoder, joined: str, between: int, count: int) -> Pieces[np.int32] | None:
        order.append("encoded")
        found = whole(self, joined, between, count)
        assert found is not None
        return (
            Pieces(found.values ^ 1, found.first, found.last) if "question 0" in joined else found
        )

    def asked(self: SpotChecks) -> Mismatch | None:
        order.append("checked")
        return answer(self)

    def built(name: str) -> tuple[dict[str, Any], dict[str, bytes]]:
        settings = {"tokenizer": str(tmp_path / "tokenizer"), "max_length": 64, "workers": 1}
        build(
            BuildConfig.of(
                inputs=str(tmp_path / "rows.jsonl"), output=str(tmp_path / name), **settings
            )
        )
        accounting = json.loads((tmp_path / name / "manifest.json").read_bytes())["accounting"]
        return accounting, content(tmp_path / name / "shards")

    right, shards = built("right")
    monkeypatch.setattr(FastEncoder, "encode_parts", spoilt)
    monkeypatch.setattr(SpotChecks, "mismatch", asked)
    wrong, others = built("wrong")
    assert order[:6] == ["encoded"] * 6
    assert others == shards
    assert (
        right["warnings"].get("encoder_failed_over", 0),
        wrong["warnings"]["encoder_failed_over"],
    ) == (0, 1)


def test_what_the_reference_encodes_is_not_compared_with_it(
    recipes: dict[str, Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    ask = Asking.ask

    def counted(self: Asking, texts: Sequence[str]) -> Callable[[], Tokens]:
        asked.append(len(texts))
        return ask(self, texts)

    monkeypatch.setattr(Asking, "ask", counted)
    data = line(["Hello there", "Hi!"]) * 3
    by_reference = dataclasses.replace(recipes["chatml"], encoder="tokenizers")
    got = Preparer(by_reference, threads=False).prepare(data, "messages", seed=0, sample=3)
    assert asked == []
    want = Preparer(recipes["chatml"], threads=False).prepare(data, "messages", seed=0, sample=3)
    assert asked == [3]
    assert np.array_equal(got.input_ids, want.input_ids)
