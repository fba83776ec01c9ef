"""Selection of the encoder: the fastest one that the probe permits, else `tokenizers`.

The probe permits an encoder where it finds no difference from `tokenizers`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sftprep.config.cache_location import cache_dir
from sftprep.config.validation import EncoderChoice
from sftprep.core.versions import version_of
from sftprep.errors import MissingDependency, TokenizerError, setting
from sftprep.tokenize.encoders.base import Encoder
from sftprep.tokenize.encoders.load import ENCODERS, load_encoder
from sftprep.tokenize.encoders.reference import HfEncoder
from sftprep.tokenize.equivalence.probe import ProbeResult, Refusal, cached_probe
from sftprep.tokenize.loading.spec import TokenizerSpec

_log = logging.getLogger(__name__)

_FAST = [name for name in ENCODERS if name != HfEncoder.name]


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
        MissingDependency: The chosen encoder is not installed.
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
    if choice != "auto":
        return _probe_chosen(spec, choice, samples, cache_folder)
    refused: list[Refusal] = []
    for name in _FAST:
        result = _probe_fast(name, spec, samples, cache_folder)
        if result.equal:
            break
        refused.append(Refusal(name, result.reason, result.example))
    is_slow = len(refused) == len(_FAST)
    if is_slow:
        result = ProbeResult(
            HfEncoder.name,
            version_of(HfEncoder.name),
            equal=False,
            checked=result.checked,
            reason="no faster encoder can be used",
        )
    if refused:
        _log.log(
            logging.WARNING if is_slow else logging.INFO,
            "%s is used for %s%s; %s",
            result.encoder,
            spec.name,
            ", which is slower" if is_slow else "",
            "; ".join(map(str, refused)),
        )
    return dataclasses.replace(result, refused=tuple(refused))


def _probe_chosen(
    spec: TokenizerSpec, name: str, samples: Sequence[str], cache_folder: Path | None
) -> ProbeResult:
    """Return the result for the only encoder that the user permits."""
    if name == HfEncoder.name:
        version = version_of(HfEncoder.name)
        return ProbeResult(name, version, equal=True, checked=0, reason="asked for")
    if not version_of(name):
        raise MissingDependency(name, needed_for=f"encoder {name}")
    result = _probe_fast(name, spec, samples, cache_folder)
    if not result.equal:
        example = f": {result.example}" if result.example else ""
        raise TokenizerError(
            f"{name} cannot be used for {spec.name}: {result.reason}{example}",
            remedy=[
                f"use {setting('encoder', 'auto')}",
                f"use {setting('encoder', HfEncoder.name)}",
            ],
        )
    return result


def _probe_fast(
    name: str, spec: TokenizerSpec, samples: Sequence[str], cache_folder: Path | None
) -> ProbeResult:
    if version_of(name):
        return cached_probe(name, spec, samples, cache_folder or cache_dir())
    reason = f"it is not installed (pip install {name})"
    return ProbeResult(
        HfEncoder.name, version_of(HfEncoder.name), equal=False, checked=0, reason=reason
    )
