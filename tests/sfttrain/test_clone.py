"""Cloning of a chat template: tokens, end token, size of the embedding, unpacking of the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from sftprep.errors import ConfigError, TokenizerError
from sfttrain import clone_chat_template
from sfttrain.models.clone_template import ClonedTemplate
from tests.sfttrain.tiny import tiny_model


@pytest.fixture
def plain(tokenizer_dir: Path, tmp_path: Path) -> Any:
    """The tokenizer of a base model, without chat tokens and without a template."""
    text = (
        (tokenizer_dir / "tokenizer.json")
        .read_text(encoding="utf-8")
        .replace("<|im_start|>", "<a>")
        .replace("<|im_end|>", "<b>")
    )
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return AutoTokenizer.from_pretrained(str(tmp_path))


def make(kind: str = "llama", rows: int = 600) -> Any:
    return tiny_model(kind, vocab_size=rows, tie_word_embeddings=kind == "opt")


@pytest.mark.parametrize("kind", ["llama", "opt"])
@pytest.mark.parametrize(("multiple", "rows"), [(64, 640), (None, 602), (1, 602)])
def test_the_embedding_grows_and_the_tokenizer_is_filled_up(
    plain: Any, tokenizer_dir: Path, kind: str, multiple: int | None, rows: int
) -> None:
    before = make(kind)
    kept = before.get_input_embeddings().weight[:600].detach().clone()
    model, tokenizer, added = clone_chat_template(
        before, plain, str(tokenizer_dir), resize_to_multiple_of=multiple
    )
    source = AutoTokenizer.from_pretrained(str(tokenizer_dir))
    assert tokenizer.chat_template == source.chat_template
    assert tokenizer.eos_token == source.eos_token == "<|im_end|>"
    assert (
        model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    )
    assert model.get_input_embeddings().weight.shape[0] == rows == len(tokenizer.get_vocab())
    assert torch.equal(model.get_input_embeddings().weight[:600], kept)
    assert added == list(range(600, rows))
    assert tokenizer.convert_ids_to_tokens(added[:2]) == ["<|im_start|>", "<|im_end|>"]
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == source.apply_chat_template(
        messages, tokenize=False
    )


def test_an_embedding_that_is_large_enough_keeps_its_size(plain: Any, tokenizer_dir: Path) -> None:
    model, tokenizer, added = clone_chat_template(make(rows=704), plain, str(tokenizer_dir))
    assert model.get_input_embeddings().weight.shape[0] == 704 == len(tokenizer.get_vocab())
    assert added == list(range(600, 704))


def test_the_result_is_equal_to_that_of_trl(plain: Any, tokenizer_dir: Path) -> None:
    trl = pytest.importorskip("trl")
    theirs = trl.clone_chat_template(
        make(), AutoTokenizer.from_pretrained(plain.name_or_path), str(tokenizer_dir)
    )
    ours = clone_chat_template(make(), plain, str(tokenizer_dir))
    assert ours.added_tokens == theirs[2]
    assert ours.tokenizer.get_vocab() == theirs[1].get_vocab()
    assert ours.model.config.vocab_size == theirs[0].config.vocab_size


def test_the_result_unpacks_to_two_or_three_values() -> None:
    found = ClonedTemplate(("model", "tokenizer", [7]))
    model, tokenizer = found
    assert (model, tokenizer) == ("model", "tokenizer")
    for _ in range(2000):  # until the interpreter has specialized the instruction
        (model, tokenizer) = found
        model, tokenizer, added = found
    assert (model, tokenizer, added) == ("model", "tokenizer", [7])
    for model, tokenizer in [found]:
        assert (model, tokenizer) == ("model", "tokenizer")
    first, *rest = found
    assert (first, rest) == ("model", ["tokenizer", [7]])
    assert list(found) == ["model", "tokenizer", [7]]
    assert (found[2], found.added_tokens, len(found), found == ("model", "tokenizer", [7])) == (
        [7],
        [7],
        3,
        True,
    )
    with pytest.raises(ValueError, match="unpack"):
        _a, _b, _c, _d = found


def test_mistakes_are_reported(plain: Any, tokenizer_dir: Path) -> None:
    with pytest.raises(TokenizerError, match="/nowhere"):
        clone_chat_template(make(), plain, "/nowhere")
    with pytest.raises(TokenizerError, match="no chat template"):
        clone_chat_template(make(), plain, plain.name_or_path)
    with pytest.raises(ConfigError, match="resize_to_multiple_of is 0"):
        clone_chat_template(make(), plain, str(tokenizer_dir), resize_to_multiple_of=0)
