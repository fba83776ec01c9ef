"""Selection of the encoder: the fastest one that the probe permits, else `tokenizers`.

The probe permits an encoder where it finds no difference from `tokenizers`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sftprep.config.cache_location import cache_dir
from sftprep.config.validation import EncoderChoice
from sftprep.core.versions import version_of
from sftprep.errors import TokenizerError, setting
from sftprep.tokenize.encoders.base import Encoder
from sftprep.tokenize.encoders.load import ENCODERS, load_encoder
from sftprep.tokenize.encoders.reference import HfEncoder
from sftprep.tokenize.equivalence.probe import ProbeResult, cached_probe
from sftprep.tokenize.loading.spec import TokenizerSpec

_log = logging.getLogger(__name__)


def make_encoder(
    spec: TokenizerSpec,
    choice: EncoderChoice,
    *,
    threads: bool,
    samples: Sequence[str] = (),
    cache_folder: Path | None = None,
) -> tuple[Encoder, ProbeResult]:
    """Return the encoder to use, and why.

    Args:
        spec: The tokenizer.
        choice: "auto" for the first of `ENCODERS` that loads the tokenizer and gives the same
            tokens as `tokenizers`, on the adversarial texts and on `samples`.
        threads: As for `load_encoder`.
        samples: Texts of the data. For few records, leave them empty: what was compared before
            costs nothing, anything else loads both encoders (0.2 to 1 s).
        cache_folder: Where answers are cached; `cache_dir()` by default.

    Raises:
        TokenizerError: The chosen encoder does not load the tokenizer, or it differs.
    """
    result = _probe(spec, choice, samples, cache_folder)
    return load_encoder(spec, result.encoder, threads=threads), result


def probe_encoder(
    spec: TokenizerSpec,
    choice: EncoderChoice,
    *,
    samples: Sequence[str] = (),
    cache_folder: Path | None = None,
) -> tuple[str, dict[str, Any]]:
    """Select an encoder as `make_encoder` does, without loading it.

    Returns:
        The name of the encoder, for `load_encoder` in a worker, and the probe for the manifest.
    """
    result = _probe(spec, choice, samples, cache_folder)
    return result.encoder, result.to_dict()


def _probe(
    spec: TokenizerSpec, choice: EncoderChoice, samples: Sequence[str], cache_folder: Path | None
) -> ProbeResult:
    if choice == HfEncoder.name:
        return ProbeResult(
            HfEncoder.name, version_of("tokenizers"), equal=True, checked=0, reason="asked for"
        )
    fast_names = [name for name in ENCODERS if name != HfEncoder.name]
    for name in fast_names if choice == "auto" else [choice]:
        result = cached_probe(name, spec, samples, cache_folder or cache_dir())
        if result.equal:
            break
        problem = f"{name} cannot be used for {spec.name}: {result.reason}" + (
            f": {result.example}" if result.example else ""
        )
        if choice != "auto":
            raise TokenizerError(
                problem,
                remedy=[
                    f"use {setting('encoder', 'auto')}",
                    f"use {setting('encoder', 'tokenizers')}",
                ],
            )
        _log.warning("%s; tokenizers is used, which is slower", problem)
    return result
