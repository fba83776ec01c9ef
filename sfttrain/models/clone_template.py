"""Take the chat template of one tokenizer over to another, with its special tokens, and make room
for them in the model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

from sftprep.errors import ConfigError, TokenizerError
from sfttrain.models.adapters import note_new_tokens


class Cloned(tuple[Any, Any, list[int]]):
    """model, tokenizer and the ids of the tokens that were added: a tuple of three, as TRL 1.16
    returns it.

    Older TRL returned two, and scripts of both kinds are about: `model, tokenizer =
    clone_chat_template(...)` and `model, tokenizer, added = clone_chat_template(...)` both work. To
    tell them apart, the instruction that takes this tuple apart is looked at: CPython's says how
    many values it wants. Where it does not say (list(...), a star, another Python) there are three.
    A function has no other way to know; whoever minds says `[:2]`.
    """

    __slots__ = ()

    @property
    def model(self) -> Any:
        """With the embedding resized, and its end token set."""
        return self[0]

    @property
    def tokenizer(self) -> Any:
        """With the template, the tokens and the end token."""
        return self[1]

    @property
    def added_tokens(self) -> list[int]:
        """Ids that the tokenizer did not have before; their embeddings are new, so they must be
        trained."""
        return list(self[2])

    def __iter__(self) -> Iterator[Any]:
        wanted = _values_unpacked(sys._getframe(1))
        return iter(self[:2] if wanted == 2 else self[:])


def clone_chat_template(
    model: Any,
    tokenizer: Any,
    source_tokenizer_path: str,
    resize_to_multiple_of: int | None = 64,
    *,
    source: Any | None = None,
) -> Cloned:
    """Give `tokenizer` the template, special tokens and end token of another, and `model` an
    embedding with room for them.

    source_tokenizer_path: folder or Hub name of that other tokenizer; source: itself, where it is
    loaded already. resize_to_multiple_of: the embedding is rounded up to a multiple of so many
    rows, and the tokenizer is filled up with `<extra_id_n>` tokens; None: no rounding. An embedding
    that has room already keeps its size. Returns model, tokenizer and the ids that are new to the
    tokenizer; see `Cloned` for scripts that want two values. Raises TokenizerError where the other
    tokenizer cannot be loaded, or has no template. Source: TRL 1.16 `clone_chat_template`, which
    shrinks an embedding that is larger than the vocabulary, and here it is never shrunk: its rows
    may be in use.
    """
    theirs = source if source is not None else _loaded(source_tokenizer_path)
    if not theirs.chat_template:
        raise TokenizerError(
            f"{source_tokenizer_path} has no chat template",
            remedy="give the tokenizer of an instruction-tuned model",
        )
    if resize_to_multiple_of is not None and resize_to_multiple_of < 1:
        raise ConfigError(
            f"resize_to_multiple_of is {resize_to_multiple_of}",
            remedy="give a number from 1 on, or None",
        )
    known = tokenizer.get_vocab()
    missing = [
        token for token in theirs.added_tokens_decoder.values() if token.content not in known
    ]
    tokenizer.add_tokens(missing)
    tokenizer.chat_template = theirs.chat_template
    tokenizer.eos_token = theirs.eos_token
    end_with(model, tokenizer, only=True)
    filler = _resize(model, tokenizer, resize_to_multiple_of)
    added = tokenizer.convert_tokens_to_ids([token.content for token in missing] + filler)
    note_new_tokens(model, added)
    return Cloned((model, tokenizer, added))


def end_with(model: Any, tokenizer: Any, *, only: bool) -> None:
    """Tell the model the tokenizer's end token: its config, and what ends a generation (`only`
    that, or that too)."""
    end = tokenizer.eos_token_id
    model.config.get_text_config().eos_token_id = end
    generation = getattr(model, "generation_config", None)
    if generation is None or end is None:
        return
    before = generation.eos_token_id
    others = [] if only or before is None else [before] if isinstance(before, int) else list(before)
    rest = [token for token in others if token != end]
    generation.eos_token_id = [end, *rest] if rest else end


def _loaded(path: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise TokenizerError(
            f"no tokenizer can be loaded from {path}: {(str(error).splitlines() or [''])[0]}",
            remedy="give the folder or Hub name of a tokenizer with a chat template",
        ) from error


def _resize(model: Any, tokenizer: Any, multiple: int | None) -> list[str]:
    """Make the embedding as long as the vocabulary, rounded up, and fill the vocabulary up to it;
    the filler tokens."""
    step = multiple or 1
    rows = int(model.get_input_embeddings().weight.shape[0])
    wanted = -(-len(tokenizer.get_vocab()) // step) * step
    if wanted > rows:
        model.resize_token_embeddings(new_num_tokens=wanted)
        rows = wanted
    if multiple is None:
        return []
    filler: list[str] = []
    number = 0
    while len(tokenizer.get_vocab()) < rows:
        name = f"<extra_id_{number}>"
        filler += [name] * int(tokenizer.add_tokens(name))
        number += 1
    return filler


def _values_unpacked(frame: FrameType) -> int | None:
    """How many values the caller's running instruction takes apart; None where it is another
    instruction, or cannot be read."""
    code, at = frame.f_code.co_code, frame.f_lasti
    if sys.implementation.name != "cpython" or not 0 <= at < len(code) - 1:
        return None
    from dis import opmap

    return code[at + 1] if code[at] == opmap["UNPACK_SEQUENCE"] else None
