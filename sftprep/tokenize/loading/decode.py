"""Decoding of ids to strings, special tokens included, for display."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sftprep.errors import MismatchError, setting
from sftprep.tokenize.loading.extend import add_tokens, missing_tokens
from sftprep.tokenize.loading.load import load_tokenizer


def load_decoder(
    name_or_dir: str,
    fingerprint: str,
    *,
    added: Sequence[dict[str, Any]] = (),
    cache: Path | None = None,
) -> Callable[[list[int]], str]:
    """Return a function from ids to a string.

    Args:
        name_or_dir: The tokenizer, as for `load_tokenizer`.
        fingerprint: The fingerprint of the tokenizer that made the ids.
        added: The tokens that were added to it, as in the manifest.
        cache: As for `load_tokenizer`.

    Raises:
        TokenizerError: The tokenizer cannot be loaded.
        MismatchError: It gives other ids than the one with this fingerprint.
    """
    from tokenizers import Tokenizer

    spec = load_tokenizer(name_or_dir, cache=cache)
    # None is missing in a tokenizer that was saved with a model.
    spec = add_tokens(spec, missing_tokens(spec, added), cache=cache)
    # Only the first half is compared. The other half is a digest of the roles of special tokens,
    # which the setting eos_token changes, and which do not affect decoding.
    if fingerprint[:32] != spec.fingerprint[:32]:
        raise MismatchError(
            f"{name_or_dir} is not the tokenizer that these shards were built with",
            remedy=(
                f"specify that tokenizer with {setting('tokenizer')}; the manifest has its name and"
                " fingerprint"
            ),
        )
    backend = Tokenizer.from_buffer(spec.json)
    return lambda ids: str(backend.decode(ids, skip_special_tokens=False))
