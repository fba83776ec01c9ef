"""The encoders, and loading of one by its name.

A new encoder is a module of this folder with a class like `Encoder` (base.py), and a line in
`ENCODERS`; `--encoder` accepts the names in `EncoderChoice` (config/validation.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from sftprep.config.cache_location import cache_dir
from sftprep.tokenize.encoders.base import Encoder
from sftprep.tokenize.encoders.bpe_ranks import find_ranks
from sftprep.tokenize.encoders.gigatoken import GigatokenEncoder
from sftprep.tokenize.encoders.reference import HfEncoder
from sftprep.tokenize.loading.spec import TokenizerSpec

LoadFunction = Callable[[TokenizerSpec, Callable[[], Encoder], Path], Encoder]
"""Loads an encoder from a tokenizer, a function that returns the reference encoder, and the folder
of the cache."""


def _load_gigatoken(
    spec: TokenizerSpec, load_reference: Callable[[], Encoder], cache_folder: Path
) -> Encoder:
    return GigatokenEncoder(spec, reference=load_reference, ranks=find_ranks(spec, cache_folder))


def _load_reference(
    spec: TokenizerSpec, load_reference: Callable[[], Encoder], cache_folder: Path
) -> Encoder:
    return load_reference()


ENCODERS: dict[str, LoadFunction] = {
    GigatokenEncoder.name: _load_gigatoken,
    HfEncoder.name: _load_reference,
}
"""The encoders by name, which is also that of their package, the fastest one first. The last one is
the reference: it is right by definition."""


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
    load_reference = reference or cache(partial(HfEncoder, spec, threads=threads))
    return ENCODERS[name](spec, load_reference, cache_folder or cache_dir())
