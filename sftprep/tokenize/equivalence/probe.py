"""The probe: a comparison of a fast encoder with `tokenizers`, once per tokenizer and encoder.

It shows whether they give the same tokens.

Steps:

1. Encode the adversarial texts, and samples of the data, with both encoders.
2. Compare the ids, and the range of characters that each token covers.
3. Cache the answer by tokenizer, library versions and processor.

Cost: 0.2 to 1 s for a new tokenizer, a file read for a known one. After the probe, a build still
compares a sample of its texts while it runs (the spot check, verified_encoder.py).
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from sftprep.core.disk_cache import read_entry, write_entry
from sftprep.core.versions import version_of
from sftprep.tokenize.encoders.base import Encoder, EncoderFault, Mismatch, first_mismatch
from sftprep.tokenize.encoders.bpe_ranks import cache_ranks
from sftprep.tokenize.encoders.load import load_encoder
from sftprep.tokenize.encoders.reference import HfEncoder
from sftprep.tokenize.loading.adversarial_texts import ADVERSARIAL_TEXTS_VERSION, adversarial_texts
from sftprep.tokenize.loading.spec import TokenizerSpec

_FORMAT = "3"  # to be increased when an entry of the cache, or what is compared, changes
_CACHED_SAMPLES = 64  # how many digests of samples an entry keeps, the latest ones


@dataclass(frozen=True, slots=True)
class Refusal:
    """An encoder that is faster than the one of a build, and why it is not used."""

    encoder: str  # a key of `ENCODERS`
    reason: str  # a sentence about it, such as "it gives other ids than tokenizers"
    example: Mismatch | None = None  # a text for which it differs

    def __str__(self) -> str:
        return f"{self.encoder}: {self.reason}" + (f": {self.example}" if self.example else "")


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The encoder of a build and its reason; a part of the manifest."""

    encoder: str  # a key of `ENCODERS`
    encoder_version: str
    # Whether the encoders are equivalent; True, unchecked, if the user chose "tokenizers".
    equal: bool
    checked: int  # number of texts compared, now or when the answer was cached
    reason: str
    example: Mismatch | None = None  # a text for which the encoders differ
    refused: tuple[Refusal, ...] = ()  # the faster encoders, in the order of `ENCODERS`

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        refused = [
            {"encoder": each.encoder, "reason": each.reason, "example": _example_dict(each.example)}
            for each in self.refused
        ]
        return {**values, "example": _example_dict(self.example), "refused": refused}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ProbeResult:
        """Return the object for these JSON values; inverse of `to_dict`."""
        refused = tuple(
            Refusal(**{**each, "example": _read_example(each["example"])})
            for each in values["refused"]
        )
        return cls(**{**values, "example": _read_example(values["example"]), "refused": refused})


def _example_dict(example: Mismatch | None) -> dict[str, Any] | None:
    return example.to_dict() if example else None


def _read_example(values: dict[str, Any] | None) -> Mismatch | None:
    return Mismatch.from_dict(values) if values else None


def cached_probe(
    name: str, spec: TokenizerSpec, samples: Sequence[str], folder: Path
) -> ProbeResult:
    """Return the answer for the adversarial texts and samples, cached if possible.

    A difference on samples is a property of the tokenizer: once found, it is the answer for every
    later call, with other samples or without.

    Args:
        name: The name of the encoder to compare with `tokenizers`.
        spec: The tokenizer.
        samples: Texts of the data; may be empty.
        folder: The folder of the cache.
    """
    path = folder / "probes" / f"{_cache_key(name, spec)}.json"
    cached, sample_digests = _read_cached(path)
    digest = _digest_samples(samples)
    if cached and (not cached.equal or not samples or digest in sample_digests):
        return cached
    reference = HfEncoder(spec, threads=True)
    texts = [*([] if cached else adversarial_texts(spec)), *samples]
    cache_ranks(spec, folder)
    try:
        # With the ranks, if there are any, so that the probe tests what builds will load.
        fast = load_encoder(
            spec, name, threads=True, reference=lambda: reference, cache_folder=folder
        )
        result = compare_encoders(fast, reference, texts)
    except EncoderFault as fault:
        result = ProbeResult(
            reference.name, reference.version, equal=False, checked=0, reason=fault.reason
        )
    if cached:
        result = dataclasses.replace(result, checked=cached.checked + len(samples))
    if samples and result.equal:
        sample_digests = [*sample_digests, digest][-_CACHED_SAMPLES:]
    write_entry(path, {"result": result.to_dict(), "samples": sample_digests})
    return result


def compare_encoders(fast: Encoder, reference: Encoder, texts: Sequence[str]) -> ProbeResult:
    """Compare the ids, and the range of characters of each token, of two encoders.

    Args:
        fast: The encoder to test.
        reference: The encoder that is right by definition.
        texts: The strings to encode.

    Returns:
        The result, whose `encoder` is the one to use.
    """

    def make_result(equal: bool, reason: str, example: Mismatch | None = None) -> ProbeResult:
        chosen = fast if equal else reference
        return ProbeResult(chosen.name, chosen.version, equal, len(texts), reason, example)

    # The reasons are stored in manifests and in the cache, so their wording is fixed.
    want, want_chars = reference.encode_with_chars(texts)
    try:
        got = fast.encode(texts)
        mismatch = first_mismatch(texts, want, got)
        if mismatch:
            return make_result(False, "it gives other ids than tokenizers", mismatch)
        got_chars = fast.token_chars(texts, got)
    except EncoderFault as fault:
        return make_result(False, fault.reason, fault.mismatch)
    if not np.array_equal(want_chars, got_chars):
        row = int(np.flatnonzero((want_chars != got_chars).any(axis=1))[0])
        text = int(np.searchsorted(want.offsets, row, side="right")) - 1
        token, expected = row - int(want.offsets[text]), tuple(want_chars[row].tolist())
        example = Mismatch(texts[text][:200], token, expected, tuple(got_chars[row].tolist()))
        return make_result(
            False, "its tokens stand for other characters than those of tokenizers", example
        )
    return make_result(True, "equal")


def _read_cached(path: Path) -> tuple[ProbeResult | None, list[str]]:
    """Return the cached answer, and the digests of its samples."""
    entry = read_entry(path)
    try:
        return (
            (ProbeResult.from_dict(entry[0]["result"]), list(entry[0]["samples"]))
            if entry
            else (None, [])
        )
    except (KeyError, TypeError):
        # Written by a version with other fields, in which _FORMAT should have been increased.
        return None, []


def _cache_key(name: str, spec: TokenizerSpec) -> str:
    """Return a digest of all inputs of the answer.

    The processor is included, since a fast encoder has code for several architectures.
    """
    versions = name, version_of(name), version_of("tokenizers"), platform.machine()
    return xxhash.xxh3_128_hexdigest(
        "\n".join((_FORMAT, str(ADVERSARIAL_TEXTS_VERSION), spec.fingerprint, *versions)).encode()
    )


def _digest_samples(samples: Sequence[str]) -> str:
    state = xxhash.xxh3_128()
    for text in samples:
        content = text.encode("utf-8", "surrogatepass")
        # The length separates the samples: ["ab"] and ["a", "b"] are different.
        state.update(len(content).to_bytes(8, "little") + content)
    return state.hexdigest()
