"""Masks by token ids equal those of the reference path, for any tokenizer, template and text."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from sftprep.config.validation import EncoderChoice, TrainOn
from sftprep.core.types import TokenBatch
from sftprep.errors import TemplateError
from sftprep.pipeline.passes.overlong import LengthLimit
from sftprep.pipeline.passes.preprocess import Preprocessor, preprocess
from sftprep.recipe import Recipe
from sftprep.render.token_space.anchors import Anchors, continuation_ids, find_anchors
from sftprep.tokenize.equivalence.verified_encoder import VerifiedEncoder
from sftprep.tokenize.loading.spec import TokenizerSpec
from sftprep.tokenize.select import probe_encoder
from tests.support import thorough
from tests.tokenize.small_tokenizers import END, START, STOP, byte_level, sentence_piece, spec_of

WHOLE = LengthLimit(max_length=4096, overlong="truncate")
MARKS = ("<|a|>", "<|b|>", "[/INST]", "<think>", "</think>")


def _token(content: str, **flags: Any) -> AddedToken:
    return AddedToken(content, **{"normalized": False, "special": True, **flags})


def _with(tokenizer: Tokenizer, *tokens: AddedToken) -> Tokenizer:
    marks = {m: _token(m, special=not m.endswith("think>")) for m in (*MARKS, START, STOP, END)}
    marks.update({token.content: token for token in tokens})
    tokenizer.add_tokens([*marks.values()])
    return tokenizer


def _dropping() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Strip()
    return tokenizer


def _removing() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


TOKENIZERS: dict[str, Tokenizer] = {
    "as gpt-2": _with(byte_level()),
    "as qwen": _with(byte_level(nfc=True, qwen=True)),
    "as llama 3": _with(byte_level(gpt4=True)),
    "as gemma": _with(sentence_piece(prepend=False)),
    "as llama 2": _with(sentence_piece(prepend=True)),
    "lstrip": _with(byte_level(), _token("<|a|>", lstrip=True)),
    "rstrip": _with(byte_level(), _token(START, rstrip=True), _token("<|a|>", rstrip=True)),
    "other rstrip": _with(byte_level(), _token("<mask>", lstrip=True, rstrip=True)),
    "single word": _with(byte_level(), _token("<|a|>", single_word=True)),
    "overlapping": _with(byte_level(), _token(">\n"), _token("|>"), _token("x<|")),
    "containing": _with(byte_level(), _token("<|a|>\n"), _token(f"{STOP}\n")),
    "newlines": _with(byte_level(), _token("\n\n", special=False), _token("\n", special=False)),
    "normalized": _with(byte_level(nfc=True), _token("<|b|>", normalized=True)),
    "prefix space": _with(byte_level(add_prefix_space=True)),
    "trimmed offsets": _with(byte_level(trim=True)),
    "strips": _with(_dropping()),
    "removes": _with(_removing()),
    "lacks bytes": _with(byte_level(every_byte=False)),
}
EXACT = {"lacks bytes", "as gpt-2", "as qwen", "as llama 3", "as gemma", "as llama 2"}

_SAID = "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "trimmed": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "assigned": "{% for m in messages %}{% set c = '<|im_start|>' + m.role + '\n' + m.content +"
    " '<|im_end|>' %}{% if loop.first %}{% set c = '<|a|>' + c %}{% endif %}{{ c }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "assigned with a variable": "{% for m in messages %}{% set c = '<|im_start|>' + m.role + '\n' +"
    " m.content + '<|im_end|>' %}{% if loop.first %}{% set c = bos_token + c %}{% endif %}{{ c }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "marked": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    f"{_SAID}{{% else %}}{{{{ m.content }}}}<|im_end|>\n{{% endif %}}{{% endfor %}}",
    "before": "{% for m in messages %}{% if m.role == 'assistant' %}<|a|>{% generation %}"
    "{{ m.content }}{% endgeneration %}{% else %}<|b|>{{ m.content }}{% endif %}{% endfor %}",
    "at one anchor": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<|a|>{% endgeneration %}{% generation %}\n{{ m.content }}{% endgeneration %}"
    "{% else %}<|b|>{{ m.content }}<|a|>{% endif %}{% endfor %}",
    "after a literal": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role =="
    " 'assistant' %}{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}{% else %}"
    "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}",
    "token in the literal": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role =="
    " 'assistant' %}<think>\n\n</think>\n\n{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}",
    "cut": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content[:2] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "reasoning": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')"
    "[-1].lstrip('\n') }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "closing": "{% for m in messages %}<|a|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|a|>assistant\n{% else %}<|im_end|>{% endif %}",
    "macro": "{% macro turn(m) %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "variable": "{% for m in messages %}{{ bos_token }}{{ m.role }}\n{{ m.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ bos_token }}assistant\n{% endif %}",
    "made anew": "{% set ns = namespace(turns=[]) %}{% for m in messages %}{% set ns.turns ="
    " ns.turns + [{'role': m.role, 'content': m.content}] %}{% endfor %}{% for m in ns.turns %}"
    "{% if m.role == 'assistant' %} {{ m.content }}<|im_end|>{% else %}<|a|>{{ m.content }}<|b|>"
    "{% endif %}{% endfor %}",
    "plain text": "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}",
}
CONTENTS = [
    *("", " ", "\n", "\n\nx", "  lead", "trail \n", "a", "Hi there", "x<|", "|>", "assistant\n"),
    *(
        *MARKS,
        "<mask>",
        f"a{STOP}",
        START,
        f"{START}assistant\n",
        END,
        f"{END}b",
        "<|im_end",
        "\n|",
    ),
    *(
        "caf\u00e9",
        "e\u0301",
        "\u0301x",
        "\u0323\u0301",
        "\u3099",
        "中文。",
        "\U0001f600",
        "\u1e135",
    ),
    *("\u0378", "<think>\nno\n</think>\n\nyes", "\u0928\u093c", "a\u0300", "<|a|", "ქ", "\u00a0"),
    # Bytes that some vocabularies lack.
    *("\x04", "a\rb", "\U00050000", "\x06\x06x"),
]
contents = st.sampled_from(CONTENTS) | st.text(max_size=5)
contents |= st.tuples(contents, contents).map("".join)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "assistant", "system"]), "content": contents}
    ),
    min_size=1,
    max_size=4,
)
chats = messages.map(lambda turns: {"messages": turns})
pairs = st.tuples(messages, contents).map(
    lambda drawn: {
        "prompt": drawn[0],
        "completion": [{"role": "assistant", "content": drawn[1]}],
    }
)


class Paths(NamedTuple):
    """Pass 1 with the fast path and without it, for records of one format."""

    fast: Preprocessor
    slow: Preprocessor
    format: str

    def compare(self, rows: list[dict[str, Any]]) -> tuple[TokenBatch, int]:
        """Compare the batch by token ids with that of the reference path.

        Returns the batch, and how many texts took the fast path.
        """
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        got, want = (preprocess(own, data, self.format, WHOLE, seed=None) for own in self[:2])
        assert np.array_equal(got.offsets, want.offsets)
        assert np.array_equal(got.input_ids, want.input_ids)
        assert np.array_equal(got.completion_mask, want.completion_mask)
        assert np.array_equal(got.line_of, want.line_of)
        assert got.rejected == want.rejected
        counts = [
            {key: count for key, count in batch.counts.items() if not key.startswith("masks.")}
            for batch in (got, want)
        ]
        assert counts[0] == counts[1]
        return got, got.counts.get("masks.by_ids", 0)


@cache
def spec(tokenizer: str) -> TokenizerSpec:
    return spec_of(TOKENIZERS[tokenizer], eos_token=STOP, bos_token="<|a|>")


@cache
def encoder_of(tokenizer: str, name: EncoderChoice) -> VerifiedEncoder:
    """Return the encoder `tokenizers`, or with "auto" the encoder that a build would choose."""
    chosen, _ = probe_encoder(spec(tokenizer), name)
    return VerifiedEncoder(spec(tokenizer), chosen, threads=False)


@cache
def paths_of(
    tokenizer: str, template: str, train_on: TrainOn, format: str, encoder: EncoderChoice = "auto"
) -> Paths | None:
    """Return both paths for a tokenizer and a template, None if no mask is proven for them."""
    recipe = Recipe(
        tokenizer=spec(tokenizer),
        chat_template=TEMPLATES[template],
        date=None,
        train_on=train_on,
        text_field="text",
        renames=(),
        encoder=encoder_of(tokenizer, encoder).fast.name,
        template_backend="auto",
    )
    fast, slow = (Preprocessor(recipe, threads=False) for _ in range(2))
    fast.encoder = slow.encoder = encoder_of(tokenizer, encoder)
    slow.renderer.templates.__dict__["anchors"] = "not used in this test"
    try:
        fast.renderer.check_masks()
    except TemplateError:
        return None
    return Paths(fast, slow, format)


@pytest.mark.parametrize("encoder", ["auto", "tokenizers"])
@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=thorough(150, default=25), deadline=None)
@given(data=st.data())
def test_both_paths_give_the_same_masks(template: str, encoder: str, data: st.DataObject) -> None:
    tokenizer = data.draw(st.sampled_from([*TOKENIZERS]))
    format, rows, train_on = data.draw(
        st.sampled_from(
            [
                ("messages", chats, "assistant"),
                ("messages", chats, "last-assistant"),
                ("prompt-completion", pairs, "completion"),
                ("prompt-completion", pairs, "assistant"),
            ]
        )
    )
    paths = paths_of(tokenizer, template, train_on, format, encoder)
    if paths is not None:  # an unproven mask is rejected before anything is read
        paths.compare(data.draw(st.lists(rows, min_size=1, max_size=6)))


@pytest.mark.parametrize("template", sorted({*TEMPLATES} - {"macro", "plain text", "closing"}))
@pytest.mark.parametrize("tokenizer", sorted(EXACT))
def test_ordinary_conversations_take_the_fast_path(tokenizer: str, template: str) -> None:
    turns = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "It"},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "so"},
    ]
    paths = paths_of(tokenizer, template, "assistant", "messages")
    assert paths is not None
    batch, by_ids = paths.compare([{"messages": turns}] * 3)
    added_blank = tokenizer == "as llama 2" and template in (
        "after a literal",
        "before",
        "at one anchor",
    )
    assert by_ids == (0 if added_blank else 3)
    assert batch.completion_mask.any()
    assert not batch.completion_mask.all()


@pytest.mark.parametrize("encoder", ["auto", "tokenizers"])
@pytest.mark.parametrize("content", ["\u0928\u093c", "a\u0301 b", "x e\u0301"])
def test_a_text_that_nfc_changes_keeps_its_mask(encoder: EncoderChoice, content: str) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": content}]
    for template in ("before", "chatml", "marked"):
        paths = paths_of("as qwen", template, "assistant", "messages", encoder)
        assert paths is not None
        paths.compare([{"messages": turns}])


def test_the_spot_check_detects_a_wrong_mask(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from sftprep.pipeline.passes import loss_mask

    place = loss_mask.place_regions

    def shifted(tokens: Any, texts: Any, table: Any, mask: Any) -> Any:
        placed = place(tokens, texts, table, mask)
        mask[:-1] = mask[1:].copy()
        return placed

    paths = paths_of("as gpt-2", "chatml", "assistant", "messages")
    assert paths is not None
    recipe = paths.fast.recipe
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    data = (json.dumps({"messages": turns}) + "\n").encode() * 50
    want = preprocess(
        Preprocessor(recipe, threads=False), data, "messages", WHOLE, seed=0, num_first=4
    )
    monkeypatch.setattr(loss_mask, "place_regions", shifted)
    got = preprocess(
        Preprocessor(recipe, threads=False), data, "messages", WHOLE, seed=0, num_first=4
    )
    assert np.array_equal(got.completion_mask, want.completion_mask)
    assert got.counts["warnings.mask_failed_over"] == 1
    assert "masks by token ids" in caplog.text
    assert got.counts["masks.by_characters"] == 50
    assert sum(n for name, n in got.counts.items() if name.startswith("masks.because.")) == 50
    assert "masks.by_ids" not in got.counts


def anchors_of(tokenizer: Tokenizer, template: str) -> Anchors | str:
    return find_anchors(spec_of(tokenizer, eos_token=STOP, bos_token="<|a|>"), template)


def test_anchors_are_the_special_tokens_that_a_template_writes() -> None:
    found = anchors_of(TOKENIZERS["as qwen"], TEMPLATES["token in the literal"])
    assert isinstance(found, Anchors)
    assert {*found.ids} == {START, STOP}
    found = anchors_of(TOKENIZERS["as qwen"], TEMPLATES["variable"])
    assert isinstance(found, Anchors)
    assert {*found.ids} == {"<|a|>", STOP}


@pytest.mark.parametrize(
    ("tokenizer", "template", "left"),
    [
        ("lstrip", "before", {"<|b|>"}),
        ("rstrip", "before", {"<|b|>"}),
        ("single word", "before", {"<|b|>"}),
        ("normalized", "before", {"<|a|>"}),
        ("containing", "before", {"<|b|>"}),
        ("containing", "chatml", {START}),
    ],
)
def test_tokens_that_may_not_be_found_are_not_anchors(
    tokenizer: str, template: str, left: set[str]
) -> None:
    found = anchors_of(TOKENIZERS[tokenizer], TEMPLATES[template])
    assert isinstance(found, Anchors)
    assert {*found.ids} == left


@pytest.mark.parametrize(
    "tokenizer", ["overlapping", "prefix space", "trimmed offsets", "strips", "removes"]
)
def test_tokenizers_that_may_drop_something_have_no_anchors(tokenizer: str) -> None:
    assert isinstance(anchors_of(TOKENIZERS[tokenizer], TEMPLATES["chatml"]), str)


def test_the_bytes_that_a_vocabulary_lacks_are_known() -> None:
    spec = spec_of(TOKENIZERS["as gpt-2"], eos_token=STOP)
    fields = json.loads(spec.json)
    del fields["model"]["vocab"]["Ċ"]
    changed = dataclasses.replace(spec, json=json.dumps(fields).encode())
    anchors = find_anchors(changed, TEMPLATES["chatml"])
    assert isinstance(anchors, Anchors)
    assert anchors.missing_bytes == b"\n"
    assert anchors.covers("a")
    assert not anchors.covers("a\n")


def test_a_conversation_with_a_byte_that_the_vocabulary_lacks_takes_the_reference_path() -> None:
    paths = paths_of("lacks bytes", "chatml", "assistant", "messages")
    assert paths is not None
    texts = ["It", "It\r\nis", "\x04", "\U00050000", "\U00010000"]
    rows = [{"messages": [{"role": "assistant", "content": text}]} for text in texts]
    assert paths.compare(rows)[1] == 2


def test_continuation_tokens_contain_no_first_byte_of_a_character() -> None:
    for name in ("as gpt-2", "as gemma"):
        tokenizer = TOKENIZERS[name]
        found = continuation_ids(spec_of(tokenizer))
        tokens = {tokenizer.id_to_token(number) for number in found}
        assert len(found) >= 64
        assert not any(token.startswith("<|") for token in tokens)
    ids = byte_level().encode("\u10e5").ids
    spec = spec_of(byte_level())
    assert [number in continuation_ids(spec) for number in ids] == [False, True, True]
