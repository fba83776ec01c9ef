"""The encoders, and loading of one by its name.

A new encoder is a module of this folder with a class like `Encoder` (base.py), and a line in
`ENCODERS`; `--encoder` accepts the names in `EncoderChoice` (config/validation.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from sftprep.config.cache_location import cache_dir
from sftprep.tokenize.encoders.base import Encoder
from sftprep.tokenize.encoders.bpe_ranks import find_ranks
from sftprep.tokenize.encoders.fastokens import FastokensEncoder
from sftprep.tokenize.encoders.gigatoken import GigatokenEncoder
from sftprep.tokenize.encoders.reference import HfEncoder
from sftprep.tokenize.loading.spec import TokenizerSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequest:
    """What the encoders are loaded from."""

    spec: TokenizerSpec
    reference: Callable[[], Encoder]  # returns the reference encoder
    threads: bool  # whether the encoder may use every core
    cache_folder: Path


class EncoderKind(NamedTuple):
    """An encoder that can be chosen; its key in `ENCODERS` is also the name of its package."""

    load: Callable[[LoadRequest], Encoder]
    needs: str  # which tokenizers it loads


def _load_gigatoken(request: LoadRequest) -> Encoder:
    ranks = find_ranks(request.spec, request.cache_folder)
    return GigatokenEncoder(request.spec, reference=request.reference, ranks=ranks)


def _load_fastokens(request: LoadRequest) -> Encoder:
    return FastokensEncoder(request.spec, reference=request.reference, threads=request.threads)


ENCODERS: dict[str, EncoderKind] = {
    "gigatoken": EncoderKind(_load_gigatoken, needs="BPE with a token for each byte"),
    "fastokens": EncoderKind(_load_fastokens, needs="BPE"),
    "tokenizers": EncoderKind(lambda request: request.reference(), needs="any tokenizer"),
}
"""The encoders by name, the fastest one first. The last one is the reference: it is right by
definition."""


def load_encoder(
    spec: TokenizerSpec,
    name: str,
    *,
    threads: bool,
    reference: Callable[[], Encoder] | None = None,
    cache_folder: Path | None = None,
) -> Encoder:
    """Load an encoder without probing it.

    This is for workers, for the probe, and for the fallback to "tokenizers".

    Args:
        spec: The tokenizer.
        name: A key of `ENCODERS`.
        threads: Whether it may use every core; a worker process among others must not.
        reference: Returns the "tokenizers" encoder, if the caller has one already.
        cache_folder: The folder of the cache; `cache_dir()` by default.

    Raises:
        EncoderFault: The encoder does not load this tokenizer.
        TokenizerError: `tokenizers` does not load it.
    """
    request = LoadRequest(
        spec=spec,
        reference=reference or cache(partial(HfEncoder, spec, threads=threads)),
        threads=threads,
        cache_folder=cache_folder or cache_dir(),
    )
    return ENCODERS[name].load(request)
