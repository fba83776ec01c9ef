"""Transfer of a chat template and its special tokens to another tokenizer.

The embedding of the model grows if the new tokens need it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from sftprep.errors import ConfigError, TokenizerError, first_line
from sfttrain.compat import count_unpacked_values
from sfttrain.models.adapters import record_new_tokens


class ClonedTemplate(tuple[Any, Any, list[int]]):
    """Result of `clone_chat_template`: model, tokenizer and ids of added tokens.

    TRL 1.16 returns three values and older versions two, and there are scripts for both. Therefore
    `model, tokenizer = clone_chat_template(...)` and `model, tokenizer, added =
    clone_chat_template(...)` both work: the iteration looks at the number of variables in the
    statement of the caller. Where this number is not known (`list(...)`, a starred variable, an
    interpreter other than CPython), there are three values. `[:2]` always gives two.
    """

    __slots__ = ()

    @property
    def model(self) -> Any:
        """The model, with the resized embedding and the new end token."""
        return self[0]

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, with the template, the added tokens and the new end token."""
        return self[1]

    @property
    def added_tokens(self) -> list[int]:
        """Ids of the new tokens; their embeddings are untrained."""
        return list(self[2])

    def __iter__(self) -> Iterator[Any]:
        count = count_unpacked_values(sys._getframe(1))
        return iter(self[:2] if count == 2 else self[:])


def clone_chat_template(
    model: Any,
    tokenizer: Any,
    source_tokenizer_path: str,
    resize_to_multiple_of: int | None = 64,
    *,
    source: Any | None = None,
) -> ClonedTemplate:
    """Copy template, special tokens and end token from another tokenizer.

    This is `clone_chat_template` of TRL 1.16 with one difference: TRL shrinks an embedding that is
    larger than the vocabulary, whose rows may be in use; here an embedding never shrinks.

    Args:
        model: The model, whose embedding grows if it has too few rows.
        tokenizer: The tokenizer, which is changed in place.
        source_tokenizer_path: The folder or Hub name of the other tokenizer.
        resize_to_multiple_of: The number of rows of the embedding is rounded up to a multiple of
            this, and the tokenizer is filled up with `<extra_id_n>` tokens. None for no rounding.
        source: The other tokenizer itself, if it is loaded already.

    Returns:
        The model, the tokenizer and the ids that are new to the tokenizer.

    Raises:
        TokenizerError: If the other tokenizer cannot be loaded or has no template.
        ConfigError: If `resize_to_multiple_of` is less than 1.
    """
    other = source if source is not None else _load_source(source_tokenizer_path)
    if not other.chat_template:
        raise TokenizerError(
            f"{source_tokenizer_path} has no chat template",
            remedy="pass the tokenizer of an instruction-tuned model",
        )
    if resize_to_multiple_of is not None and resize_to_multiple_of < 1:
        raise ConfigError(
            f"resize_to_multiple_of is {resize_to_multiple_of}",
            remedy="pass a number of at least 1, or None",
        )
    vocabulary = tokenizer.get_vocab()
    missing = [
        token for token in other.added_tokens_decoder.values() if token.content not in vocabulary
    ]
    tokenizer.add_tokens(missing)
    tokenizer.chat_template = other.chat_template
    tokenizer.eos_token = other.eos_token
    set_end_token(model, tokenizer, replace=True)
    filler = _resize(model, tokenizer, resize_to_multiple_of)
    added = tokenizer.convert_tokens_to_ids([token.content for token in missing] + filler)
    record_new_tokens(model, added)
    return ClonedTemplate((model, tokenizer, added))


def set_end_token(model: Any, tokenizer: Any, *, replace: bool) -> None:
    """Set the tokenizer's end token in both configs of a model.

    They are the config and the generation config.

    Args:
        model: The model.
        tokenizer: The tokenizer.
        replace: Whether a generation ends at this token only; else it also ends at the tokens at
            which it ended before.
    """
    end = tokenizer.eos_token_id
    model.config.get_text_config().eos_token_id = end
    generation = getattr(model, "generation_config", None)
    if generation is None or end is None:
        return
    before = generation.eos_token_id
    previous = (
        [] if replace or before is None else [before] if isinstance(before, int) else list(before)
    )
    rest = [token for token in previous if token != end]
    generation.eos_token_id = [end, *rest] if rest else end


def _load_source(path: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise TokenizerError(
            f"no tokenizer can be loaded from {path}: {first_line(error, 400)}",
            remedy="pass the folder or Hub name of a tokenizer with a chat template",
        ) from error


def _resize(model: Any, tokenizer: Any, multiple: int | None) -> list[str]:
    """Grow the embedding to the rounded size of the vocabulary, and fill the latter.

    Returns:
        The filler tokens.
    """
    step = multiple or 1
    rows = int(model.get_input_embeddings().weight.shape[0])
    needed = -(-len(tokenizer.get_vocab()) // step) * step
    if needed > rows:
        model.resize_token_embeddings(new_num_tokens=needed)
        rows = needed
    if multiple is None:
        return []
    filler: list[str] = []
    number = 0
    while len(tokenizer.get_vocab()) < rows:
        name = f"<extra_id_{number}>"
        filler += [name] * int(tokenizer.add_tokens(name))  # 0 if the vocabulary has this token
        number += 1
    return filler
