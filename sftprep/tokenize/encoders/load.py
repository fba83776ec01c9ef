"""Loading of an encoder by its name."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

from sftprep.config.cache_location import cache_dir
from sftprep.tokenize.encoders.base import Encoder
from sftprep.tokenize.encoders.bpe_ranks import find_ranks
from sftprep.tokenize.encoders.gigatoken import FastEncoder
from sftprep.tokenize.encoders.reference import HfEncoder
from sftprep.tokenize.loading.spec import TokenizerSpec


def load_encoder(
    spec: TokenizerSpec, name: str, *, threads: bool, reference: Callable[[], Encoder] | None = None
) -> Encoder:
    """Load an encoder without probing it.

    This is for workers, and for the fallback to "tokenizers".

    Args:
        spec: The tokenizer.
        name: "gigatoken" or "tokenizers".
        threads: Whether it may use every core; a worker process among others must not.
        reference: Returns the "tokenizers" encoder, if the caller has one already.

    Raises:
        EncoderFault: gigatoken does not load this tokenizer.
        TokenizerError: `tokenizers` does not load it.
    """
    load_reference = reference or cache(partial(HfEncoder, spec, threads=threads))
    if name != FastEncoder.name:
        return load_reference()
    return FastEncoder(spec, reference=load_reference, ranks=find_ranks(spec, cache_dir()))
