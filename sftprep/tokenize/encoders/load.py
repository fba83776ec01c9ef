"""An encoder by its name."""

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
    """The encoder of that name, without asking whether it is right: for workers, and to fail over
    to "tokenizers".

    threads: whether it may use every core; a worker process among others does not. reference: makes
    the "tokenizers" encoder, for one that is loaded anyway. Raises EncoderFault, TokenizerError.
    """
    made = reference or cache(partial(HfEncoder, spec, threads=threads))
    if name != FastEncoder.name:
        return made()
    return FastEncoder(spec, reference=made, ranks=find_ranks(spec, cache_dir()))
