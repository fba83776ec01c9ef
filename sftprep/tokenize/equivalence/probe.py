"""Do gigatoken and `tokenizers` give the same for this tokenizer? Compared once, answered from the
cache from then on."""

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
from sftprep.tokenize.encoders.bpe_ranks import find_ranks, cache_ranks
from sftprep.tokenize.encoders.gigatoken import FastEncoder
from sftprep.tokenize.encoders.reference import HfEncoder
from sftprep.tokenize.loading.adversarial_texts import ADVERSARIAL_TEXTS_VERSION, adversarial_texts
from sftprep.tokenize.loading.spec import TokenizerSpec

_FORMAT = "2"
"""Raised when an entry of the cache, or what is compared, changes."""
_SAMPLES_REMEMBERED = 64


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """Which encoder a build uses, and why; it goes into the manifest.

    equal: whether gigatoken gives what tokenizers gives (True, unchecked, where tokenizers was
    asked for); checked: texts compared, now or when the answer was found; example: a text on which
    they differ.
    """

    encoder: str
    encoder_version: str
    equal: bool
    checked: int
    reason: str
    example: Mismatch | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**values, "example": self.example.to_dict() if self.example else None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ProbeResult:
        """The inverse of `to_dict`."""
        example = values["example"]
        return cls(**{**values, "example": Mismatch.from_dict(example) if example else None})


def cached_probe(spec: TokenizerSpec, samples: Sequence[str], folder: Path) -> ProbeResult:
    """The answer for the fixed texts and for `samples`, from the cache folder or found out now and
    left there.

    A difference on samples is a fact about the tokenizer: from then on it holds without them too.
    """
    place = folder / "probes" / f"{_key(spec)}.json"
    known, seen = _known(place)
    digest = _digest(samples)
    if known and (not known.equal or not samples or digest in seen):
        return known
    reference = HfEncoder(spec, threads=True)
    texts = [*([] if known else adversarial_texts(spec)), *samples]
    cache_ranks(spec, folder)
    try:
        fast = FastEncoder(spec, reference=lambda: reference, ranks=find_ranks(spec, folder))
        result = compare_encoders(fast, reference, texts)
    except EncoderFault as fault:
        result = ProbeResult(
            reference.name, reference.version, equal=False, checked=0, reason=fault.reason
        )
    if known:
        result = dataclasses.replace(result, checked=known.checked + len(samples))
    if samples and result.equal:
        seen = [*seen, digest][-_SAMPLES_REMEMBERED:]
    write_entry(place, {"result": result.to_dict(), "samples": seen})
    return result


def compare_encoders(fast: Encoder, reference: Encoder, texts: Sequence[str]) -> ProbeResult:
    """Compare on `texts` the ids, and the characters that each token stands for. The encoder of the
    result is the one to use."""

    def answer(equal: bool, reason: str, example: Mismatch | None = None) -> ProbeResult:
        chosen = fast if equal else reference
        return ProbeResult(chosen.name, chosen.version, equal, len(texts), reason, example)

    want, want_chars = reference.encode_with_chars(texts)
    try:
        got = fast.encode(texts)
        mismatch = first_mismatch(texts, want, got)
        if mismatch:
            return answer(False, "it gives other ids than tokenizers", mismatch)
        got_chars = fast.token_chars(texts, got)
    except EncoderFault as fault:
        return answer(False, fault.reason, fault.mismatch)
    if not np.array_equal(want_chars, got_chars):
        row = int(np.flatnonzero((want_chars != got_chars).any(axis=1))[0])
        text = int(np.searchsorted(want.offsets, row, side="right")) - 1
        token, expected = row - int(want.offsets[text]), tuple(want_chars[row].tolist())
        example = Mismatch(texts[text][:200], token, expected, tuple(got_chars[row].tolist()))
        return answer(
            False, "its tokens stand for other characters than those of tokenizers", example
        )
    return answer(True, "equal")


def _known(place: Path) -> tuple[ProbeResult | None, list[str]]:
    """What the cache holds: the answer, and digests of the samples that it holds for too."""
    found = read_entry(place)
    try:
        return (
            (ProbeResult.from_dict(found[0]["result"]), list(found[0]["samples"]))
            if found
            else (None, [])
        )
    except (
        KeyError,
        TypeError,
    ):  # written by another version of ProbeResult, whose author forgot to raise _FORMAT
        return None, []


def _key(spec: TokenizerSpec) -> str:
    """Everything that the answer depends on; the processor too, since gigatoken has code for
    several."""
    versions = version_of("gigatoken"), version_of("tokenizers"), platform.machine()
    return xxhash.xxh3_128_hexdigest(
        "\n".join((_FORMAT, str(ADVERSARIAL_TEXTS_VERSION), spec.fingerprint, *versions)).encode()
    )


def _digest(samples: Sequence[str]) -> str:
    state = xxhash.xxh3_128()
    for text in samples:
        content = text.encode("utf-8", "surrogatepass")
        state.update(len(content).to_bytes(8, "little") + content)
    return state.hexdigest()
