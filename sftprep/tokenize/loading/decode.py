"""Ids back to text, special tokens included, for people to look at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sftprep.errors import MismatchError
from sftprep.tokenize.loading.load import load_tokenizer


def load_decoder(
    name_or_dir: str, fingerprint: str, *, cache: Path | None = None
) -> Callable[[list[int]], str]:
    """A function from ids to text, for the tokenizer with this fingerprint; cache: as for
    `load_tokenizer`.

    Raises TokenizerError where it cannot be loaded, MismatchError where it is another one by now.
    """
    from tokenizers import Tokenizer

    spec = load_tokenizer(name_or_dir, cache=cache)
    # --eos-token changes the other half, the roles of special tokens, and no id; what counts here
    # is that ids mean the same.
    if fingerprint[:32] != spec.fingerprint[:32]:
        raise MismatchError(
            f"{name_or_dir} is not the tokenizer that these shards were built with",
            remedy="name that one with --tokenizer; the manifest has its name and fingerprint",
        )
    backend = Tokenizer.from_buffer(spec.json)
    return lambda ids: str(backend.decode(ids, skip_special_tokens=False))
