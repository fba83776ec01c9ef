"""Which encoder a tokenizer gets: gigatoken (gigatoken.py) where it is known to be right, else
`tokenizers` (reference.py)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from sftprep.config.cache_location import cache_dir
from sftprep.core.versions import version_of
from sftprep.errors import TokenizerError
from sftprep.tokenize.encoders.base import Encoder
from sftprep.tokenize.encoders.load import load_encoder
from sftprep.tokenize.encoders.reference import HfEncoder
from sftprep.tokenize.equivalence.probe import ProbeResult, cached_probe
from sftprep.tokenize.loading.spec import TokenizerSpec

Choice = Literal["auto", "gigatoken", "tokenizers"]

_log = logging.getLogger(__name__)


def make_encoder(
    spec: TokenizerSpec,
    choice: Choice,
    *,
    threads: bool,
    samples: Sequence[str] = (),
    cache_folder: Path | None = None,
) -> tuple[Encoder, ProbeResult]:
    """The encoder to use, and why.

    auto: gigatoken where it loads the tokenizer and gives what tokenizers gives, on the fixed texts
    of adversarial_texts.py and on `samples`. The answer is kept (cache_folder, `cache_dir()` by
    default) by tokenizer, versions and digest of the samples: what was compared before costs
    nothing, anything else loads both (0.2 to 1 s). For a few records, leave `samples` empty. Raises
    TokenizerError where gigatoken was asked for by name and is not equal, or does not load.
    """
    result = _chosen(spec, choice, samples, cache_folder)
    return load_encoder(spec, result.encoder, threads=threads), result


def probe_encoder(
    spec: TokenizerSpec,
    choice: Choice,
    *,
    samples: Sequence[str] = (),
    cache_folder: Path | None = None,
) -> tuple[str, dict[str, Any]]:
    """As `make_encoder`, without loading it: its name, for `load_encoder` in a worker, and the
    facts, for the manifest."""
    result = _chosen(spec, choice, samples, cache_folder)
    return result.encoder, result.to_dict()


def _chosen(
    spec: TokenizerSpec, choice: Choice, samples: Sequence[str], cache_folder: Path | None
) -> ProbeResult:
    if choice == "tokenizers":
        return ProbeResult(
            HfEncoder.name, version_of("tokenizers"), equal=True, checked=0, reason="asked for"
        )
    result = cached_probe(spec, samples, cache_folder or cache_dir())
    if not result.equal:
        why = f"gigatoken cannot be used for {spec.name}: {result.reason}" + (
            f": {result.example}" if result.example else ""
        )
        if choice == "gigatoken":
            raise TokenizerError(why, remedy="use --encoder auto or --encoder tokenizers")
        _log.warning("%s; tokenizers is used, which is slower", why)
    return result
