"""A spec equals what AutoTokenizer reports, and its fingerprint covers what ids depend on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from sftprep.errors import TokenizerError
from sftprep.tokenize.encoders.reference import HfEncoder
from sftprep.tokenize.loading.adversarial_texts import adversarial_texts
from sftprep.tokenize.loading.spec import TokenizerSpec, tokenizer_spec
from tests.support import needs_shared
from tests.tokenize.real_tokenizers import REAL, real_spec, real_tokenizer
from tests.tokenize.small_tokenizers import (
    CHATML,
    END,
    START,
    STOP,
    byte_level,
    live,
    sentence_piece,
    spec_of,
)


@needs_shared
@pytest.mark.parametrize("name", REAL)
def test_equals_auto_tokenizer(name: str) -> None:
    tokenizer, spec = real_tokenizer(name), real_spec(name)
    assert spec.special_tokens == tokenizer.special_tokens_map
    assert (spec.eos_token, spec.eos_token_id) == (tokenizer.eos_token, tokenizer.eos_token_id)
    assert (spec.bos_token_id, spec.pad_token_id) == (
        tokenizer.bos_token_id,
        tokenizer.pad_token_id,
    )
    assert spec.chat_template == tokenizer.chat_template
    assert spec.vocab_size == 1 + max(tokenizer.get_vocab().values())
    assert spec.model_max_length == (
        tokenizer.model_max_length if tokenizer.model_max_length < 1e20 else None
    )

    texts = [*adversarial_texts(spec)[:50], *adversarial_texts(spec)[59:100]]
    tokens = HfEncoder(spec, threads=True).encode(texts)
    for number, text in enumerate(texts):
        ids = tokens.ids_of_text(number).tolist()
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert [*spec.prefix_ids, *ids, *spec.suffix_ids] == tokenizer(text)["input_ids"]


def test_fields_of_a_small_tokenizer() -> None:
    spec = spec_of(
        byte_level(),
        eos_token=STOP,
        bos_token=START,
        pad_token=END,
        chat_template=CHATML,
        model_max_length=512,
    )
    assert (spec.eos_token, spec.eos_token_id, spec.bos_token_id, spec.pad_token_id) == (
        STOP,
        2,
        1,
        0,
    )
    assert (spec.vocab_size, spec.model_max_length, spec.chat_template, spec.named_templates) == (
        400,
        512,
        CHATML,
        {},
    )
    assert (spec.prefix_ids, spec.suffix_ids, spec.split_special_tokens) == ((), (), False)
    assert spec.added_tokens() == {END: 0, START: 1, STOP: 2}
    assert spec_of(sentence_piece(prepend=True)).prefix_ids == (1,)
    assert spec_of(byte_level()).model_max_length is None


def test_the_default_of_named_templates_is_the_chat_template() -> None:
    named = {"default": CHATML, "tool_use": "{{ tools }}"}
    spec = spec_of(byte_level(), chat_template=named)
    assert (spec.chat_template, spec.named_templates) == (CHATML, named)
    assert spec_of(byte_level(), chat_template={"rag": "x"}).chat_template is None


def test_fields_survive_json() -> None:
    spec = spec_of(
        sentence_piece(prepend=True),
        eos_token="</s>",
        chat_template={"default": CHATML, "tool_use": "x"},
    )
    assert TokenizerSpec.from_fields(json.loads(json.dumps(spec.to_fields())), spec.json) == spec


def test_with_eos_changes_the_role_and_not_the_ids() -> None:
    spec = spec_of(byte_level(), eos_token=END)
    other = spec.with_eos(STOP)
    assert (other.eos_token, other.eos_token_id, other.special_tokens["eos_token"]) == (
        STOP,
        2,
        STOP,
    )
    assert other.fingerprint[:32] == spec.fingerprint[:32]
    assert other.fingerprint[32:] != spec.fingerprint[32:]
    assert other.with_eos(END) == spec
    assert spec.with_eos("a").eos_token_id == spec.token_id(
        "a"
    )  # any token of the vocabulary is accepted
    with pytest.raises(
        TokenizerError, match=r"<nowhere>.*not in the vocabulary[\s\S]*<\|im_end\|>"
    ):
        spec.with_eos("<nowhere>")


@needs_shared
def test_token_id_of_every_kind_of_vocabulary() -> None:
    for name, token in (("t5", "▁the"), ("mistral-v3", "▁the"), ("gpt2", "Ġthe")):
        tokenizer, spec = real_tokenizer(name), real_spec(name)
        assert spec.token_id(token) == tokenizer.convert_tokens_to_ids(token)
        assert spec.token_id("no such token") is None


def test_the_fingerprint_depends_on_the_ids_and_not_on_the_last_call() -> None:
    tokenizer = live(byte_level(), eos_token=STOP)
    before = tokenizer_spec(tokenizer)
    tokenizer.pad_token = END
    tokenizer.chat_template = CHATML
    tokenizer(["a b c", "a"], truncation=True, max_length=2, padding="max_length")
    tokenizer.backend_tokenizer.enable_padding(pad_token='"added_tokens":', length=9)
    tokenizer.backend_tokenizer.enable_truncation(2)
    after = tokenizer_spec(tokenizer)
    assert (after.fingerprint, after.json) == (before.fingerprint, before.json)
    assert (
        HfEncoder(after, threads=False).encode(["a b c d e f"]).ids_of_text(0).tolist()
        == tokenizer("a b c d e f")["input_ids"]
    )

    tokenizer.add_tokens(["<new>"])
    assert tokenizer_spec(tokenizer).fingerprint[:32] != before.fingerprint[:32]


def test_setting_to_split_special_tokens_is_kept() -> None:
    spec = spec_of(byte_level(), split_special_tokens=True)
    assert spec.split_special_tokens
    assert len(HfEncoder(spec, threads=False).encode([STOP]).input_ids) > 1
    assert spec.fingerprint[:32] != spec_of(byte_level()).fingerprint[:32]


def test_a_part_is_found_among_strings_that_look_like_it() -> None:
    spec = spec_of(
        byte_level(
            nfc=True, added=(AddedToken('"normalizer":{"type":"Fake"},"model":', normalized=False),)
        )
    )
    assert spec.part("normalizer") == {"type": "NFC"}
    assert spec.part("model")["type"] == "BPE"
    assert spec.part("nothing") is None


class _Wordwise:
    """A tokenizer that adds a token only to texts of some length."""

    is_fast, name_or_path, special_tokens_map, chat_template = True, "odd", {}, None

    def __init__(self) -> None:
        self.backend_tokenizer = byte_level()

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = self.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return {"input_ids": [*ids, 2] if add_special_tokens and len(ids) > 3 else ids}


def test_a_tokenizer_that_cannot_be_written_as_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="ByT5Tokenizer, which has no fast backend"):
        tokenizer_spec(ByT5Tokenizer())
    with pytest.raises(TokenizerError, match="depends on the text"):
        tokenizer_spec(_Wordwise())

    values: dict[str, Any] = json.loads(byte_level().to_str())
    values["model"]["dropout"] = 0.1
    with pytest.raises(TokenizerError, match="BPE dropout"):
        spec_of(Tokenizer.from_str(json.dumps(values)))


def with_vocabulary(change: Callable[[dict[str, int]], Any]) -> PreTrainedTokenizerFast:
    content = json.loads(byte_level().to_str())
    change(content["model"]["vocab"])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))


def test_ids_far_beyond_the_number_of_tokens_are_refused() -> None:
    hostile = with_vocabulary(lambda vocabulary: vocabulary.update(zzqq=30_000_000))
    with pytest.raises(TokenizerError, match="ids up to 30,000,000"):
        tokenizer_spec(hostile)


def test_bytes_that_a_vocabulary_lacks_are_known() -> None:
    assert tokenizer_spec(with_vocabulary(len)).missing_bytes == ()
    poorer = with_vocabulary(lambda vocabulary: vocabulary.pop("\u0104"))  # the byte 4
    assert tokenizer_spec(poorer).missing_bytes == (4,)
    assert poorer("a\x04b")["input_ids"] == poorer("a")["input_ids"] + poorer("b")["input_ids"]
