"""Ids back to text, special tokens included, for people to look at."""

from __future__ import annotations

from collections.abc import Callable

from sftprep.errors import MismatchError
from sftprep.tokenize.load import load_tokenizer


def decoder_of(name_or_dir: str, fingerprint: str) -> Callable[[list[int]], str]:
    """A function from ids to text, for the tokenizer with this fingerprint.

    Raises TokenizerError where it cannot be loaded, MismatchError where it is another one by now.
    """
    from tokenizers import Tokenizer

    spec = load_tokenizer(name_or_dir)
    # --eos-token changes the fingerprint and no id; what counts here is that ids mean the same.
    if fingerprint not in {spec.fingerprint, *(spec.with_eos(token).fingerprint for token in spec.added_tokens())}:
        raise MismatchError(
            f"{name_or_dir} is not the tokenizer that these shards were built with",
            remedy="name that one with --tokenizer; the manifest has its name and fingerprint",
        )
    backend = Tokenizer.from_str(spec.json)
    return lambda ids: str(backend.decode(ids, skip_special_tokens=False))
