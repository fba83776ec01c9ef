"""Texts that are encoded in the frame of their literals get the ids that `tokenizers` gives the
whole."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from sftprep.tokenize.between import COMMA, may_end, takes_commas
from sftprep.tokenize.fast import FastEncoder
from sftprep.tokenize.hf import HfEncoder
from sftprep.tokenize.seams import Frame, Heads, encode_framed, seams_of
from sftprep.tokenize.spec import TokenizerSpec
from tests.support import needs_shared
from tests.tokenize.made import END, START, STOP, byte_level, sentence_piece, spec_of
from tests.tokenize.real import FAST, real_fast, real_reference, real_spec

LONGER = f"{STOP}\n{START}user"
MADE = {
    "as gpt-2": byte_level(),
    "as llama": byte_level(nfc=True, gpt4=True),
    "as qwen": byte_level(nfc=True, qwen=True),
    "a longer one": byte_level(added=(AddedToken(LONGER, special=True, normalized=False),)),
    "one that starts with an end": byte_level(
        added=(AddedToken("\nuser", normalized=False), AddedToken(">x", normalized=False))
    ),
    "blanks as tokens": byte_level(
        gpt4=True, added=(AddedToken("  ", normalized=False), AddedToken("\n\n", normalized=False))
    ),
    "bare letters": byte_level(
        added=(AddedToken("a", normalized=False), AddedToken("r\na", normalized=False))
    ),
}
LITERALS = [
    f"{START}user\n",
    f"{STOP}\n{START}user\n",
    f"{STOP}\n{START}assistant\n",
    f"{STOP}\n",
    STOP,
    "",
    "user: ",
    "\n",
]
LITERALS += [
    f"{STOP} ",
    f"{START}{START}",
    f"{STOP}{END}x",
    END,
    f"x{STOP}\n{START}",
    f"{STOP}<",
    f">{STOP}\n\n",
]
LITERALS += [f"{STOP}e\u0301"]
PIECES = [
    END,
    START,
    STOP,
    STOP[:3],
    STOP[3:],
    START[:-1],
    "\n",
    " ",
    "  ",
    "\t",
    "user",
    "hello",
    "a",
    "x",
    "ser",
    "1",
]
PIECES += ["23", "'s", "0", "07", "'l", ".", "!\n", COMMA, COMMA[:2], COMMA[1]]
PIECES += [
    "\u0301",
    "e",
    "\u00e9",
    "中",
    "\U0001f600",
    "\u1e0b\u0323",
    "\u1e135",
    "\u0000",
    "<",
    ">",
    "|",
    "/",
    '"',
    "\\",
]
contents = st.lists(st.sampled_from(PIECES), max_size=5).map("".join)


@cache
def spec(name: str) -> TokenizerSpec:
    return spec_of(MADE[name]) if name in MADE else real_spec(name)


@cache
def fast(name: str) -> FastEncoder:
    return (
        FastEncoder(spec(name), threads=False, reference=lambda: reference(name))
        if name in MADE
        else real_fast(name)
    )


@cache
def reference(name: str) -> HfEncoder:
    return HfEncoder(spec(name), threads=False) if name in MADE else real_reference(name)


def check(name: str, shapes: list[list[str]], picked: list[tuple[int, list[str]]]) -> bool | None:
    """Whether the texts were encoded without being made, None where no shape has a frame; what was
    encoded is compared."""
    seams = seams_of(spec(name))
    frames = [None if seams is None else seams.frame(literals) for literals in shapes]
    texts, parts, used = list[str](), list[tuple[str, str]](), list[Frame]()
    for number, own in picked:
        frame, literals = frames[number % len(shapes)], shapes[number % len(shapes)]
        if frame is None:
            continue
        filling = (own * len(literals))[: len(literals) - 1] if own else [""] * (len(literals) - 1)
        used.append(frame)
        parts += zip(frame.tails, filling, strict=True)
        texts.append("".join(a + b for a, b in zip(literals, [*filling, ""], strict=True)))
    if seams is None or not texts:
        return None
    after = [
        COMMA if seams.commas and may_end(content) else seams.between.text for _, content in parts
    ]
    joined = "".join(
        tail + content + between
        for (tail, content), between in zip(parts, [*after[:-1], ""], strict=True)
    )
    heads = Heads()
    for _ in range(2):  # the second time, they are known
        got = encode_framed(fast(name), used, joined, after[:-1].count(COMMA), heads)
        if got is None:
            return False
        want = reference(name).encode(texts)
        assert got.input_ids.tolist() == want.input_ids.tolist(), texts
        assert got.offsets.tolist() == want.offsets.tolist(), texts
    return True


shapes = st.lists(
    st.lists(st.sampled_from(LITERALS), min_size=2, max_size=5), min_size=1, max_size=3
)
picked = st.lists(
    st.tuples(st.integers(0, 2), st.lists(contents, max_size=3)), min_size=1, max_size=4
)


@pytest.mark.parametrize("name", MADE)
@settings(max_examples=200, deadline=None)
@given(shapes=shapes, picked=picked)
def test_in_frames_as_whole(
    name: str, shapes: list[list[str]], picked: list[tuple[int, list[str]]]
) -> None:
    check(name, shapes, picked)


@needs_shared
@pytest.mark.parametrize("name", FAST)
@settings(max_examples=100, deadline=None)
@given(shapes=shapes, picked=picked)
def test_real_tokenizers(
    name: str, shapes: list[list[str]], picked: list[tuple[int, list[str]]]
) -> None:
    check(name, shapes, picked)


CHAT = [f"{START}user\n", f"{STOP}\n{START}assistant\n", f"{STOP}\n"]


@pytest.mark.parametrize("name", ["as gpt-2", "as qwen"])
def test_ordinary_chats_have_frames(name: str) -> None:
    assert check(name, [CHAT], [(0, ["Hello there!", "  Hi\n"]), (0, ["", "\n"])])


@pytest.mark.parametrize("name", ["a longer one", "one that starts with an end", "bare letters"])
def test_a_token_that_may_stand_across_a_seam_is_no_frame(name: str) -> None:
    seams = seams_of(spec(name))
    literals = (
        [f"{START}user", f"{LONGER[:-3]}", STOP]
        if name == "a longer one"
        else [*CHAT[:2], f"{STOP}\n"]
    )
    assert seams is None or seams.frame(literals) is None


def test_contents_that_spell_what_stands_between_are_encoded_as_texts() -> None:
    seams = seams_of(spec("as qwen"))
    assert seams is not None
    assert check("as qwen", [CHAT], [(0, ["a", f"b{seams.between.text}c"])]) is False


def test_contents_that_hold_a_comma_are_encoded_as_texts() -> None:
    assert check("as qwen", [CHAT], [(0, ["a", f"b{COMMA}c"]), (0, ["d", "e"])]) is False


@pytest.mark.parametrize("token", ["x0", "0x", "a\x01b"])
def test_tokens_that_a_comma_could_complete_allow_none(token: str) -> None:
    made = byte_level(nfc=True, qwen=True, added=(AddedToken(token, normalized=False),))
    assert takes_commas(spec("as qwen"))
    assert not takes_commas(spec_of(made))
    assert not takes_commas(spec("as gpt-2"))


def test_tokenizers_whose_tokens_take_blanks_have_no_seams() -> None:
    takes = byte_level(added=(AddedToken("<mask>", lstrip=True, rstrip=True, normalized=False),))
    assert seams_of(spec_of(takes)) is None
    assert seams_of(spec_of(sentence_piece(prepend=True))) is None
