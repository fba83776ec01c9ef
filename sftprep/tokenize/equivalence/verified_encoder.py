"""The encoder of a build, some of whose texts the reference encoder encodes as well."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache, cached_property, partial

import numpy as np
from numpy.typing import NDArray

from sftprep.core.hashing import hash64_array
from sftprep.tokenize.encoders.base import Encoder, EncoderFault, Tokens, first_mismatch
from sftprep.tokenize.encoders.load import load_encoder
from sftprep.tokenize.encoders.reference import HfEncoder
from sftprep.tokenize.equivalence.reference_client import (
    ReferenceClient,
    ReferenceServer,
    ServerAddress,
)
from sftprep.tokenize.loading.spec import TokenizerSpec

CHECKED_EVERY = 1_000
"""One text in so many is compared."""

_log = logging.getLogger(__name__)


class VerifiedEncoder:
    """The encoder of a recipe, loaded once and used for many partitions.

    spec: of the tokenizer; name: of the encoder; threads: it may use every core.
    """

    def __init__(self, spec: TokenizerSpec, name: str, *, threads: bool) -> None:
        self.spec, self._name, self._threads = spec, name, threads
        self._reference = cache(partial(HfEncoder, spec, threads=threads))
        self._place: ServerAddress | None = None
        self._child: ReferenceServer | None = None
        self._asking: ReferenceClient | None = None
        self._reported = False

    @cached_property
    def fast(self) -> Encoder:
        """The encoder of that name. Raises EncoderFault if it cannot be loaded."""
        return load_encoder(self.spec, self._name, threads=self._threads, reference=self._reference)

    @property
    def reference(self) -> Encoder:
        """`tokenizers`."""
        return self._reference()

    def ask(self, place: ServerAddress | None) -> None:
        """Use the reference encoder of a child process; None: as before."""
        if place is not None and place != self._place:
            self._place, self._asking = place, None

    def partition(self, *, seed: int | None, first: int = 0) -> PartitionEncoder:
        """The encoder for one partition.

        seed: chooses the texts to compare, one in CHECKED_EVERY; first: so many texts at the start
        are compared as well. None: nothing is compared.
        """
        compared = seed is not None and self._name != HfEncoder.name
        if compared and first:
            self._start_asking()  # a child starts to load now, while this process reads
        return PartitionEncoder(self, seed or 0, first, compared=compared)

    def partition_by_reference(self) -> PartitionEncoder:
        """The reference encoder for one partition."""
        return PartitionEncoder(self, 0, 0, compared=False, by_reference=True)

    def report(self, fault: EncoderFault) -> None:
        """Log the first fault of this process; all are counted."""
        if not self._reported:
            self._reported = True
            _log.warning("%s is not used for a part of the records: %s", self._name, fault)

    def _start_asking(self) -> ReferenceClient:
        if self._asking is None:
            if self._place is None and self._threads and self._name != HfEncoder.name:
                self._child = ReferenceServer(self.spec)
                self._place = self._child.place
            self._asking = ReferenceClient(self._place, self._reference)
        return self._asking

    def ask_reference(self, texts: Sequence[str]) -> Callable[[], Tokens]:
        """Have the reference encode these texts meanwhile; the result waits for them."""
        return self._start_asking().ask(texts)


class PartitionEncoder:
    """Encodes the texts of one partition, and keeps samples until they are compared."""

    def __init__(
        self,
        encoder: VerifiedEncoder,
        seed: int,
        first: int,
        *,
        compared: bool,
        by_reference: bool = False,
    ) -> None:
        self._encoder, self._by_reference = encoder, by_reference
        self._seed, self._first, self._compared = seed, first, compared
        self._open: list[tuple[list[str], Callable[[], Tokens], Tokens]] = []
        self.samples: list[int] = []
        """Numbers of the texts in the last call of `encode` that are compared."""

    @property
    def encoder(self) -> Encoder:
        """The encoder itself."""
        return self._encoder.reference if self._by_reference else self._encoder.fast

    def encode(self, texts: Sequence[str]) -> Tokens:
        """Ids of each text. Raises EncoderFault, TokenizerError."""
        self.samples = []
        if self._compared:
            self.samples = sample_numbers(len(texts), self._seed, first=self._first)
            self._first = max(0, self._first - len(texts))
        chosen = [texts[number] for number in self.samples]
        answer = self._encoder.ask_reference(chosen) if chosen else None
        tokens = self.encoder.encode(texts)
        if answer is not None:
            self._open.append((chosen, answer, tokens.take(self.samples)))
        return tokens

    def verify(self) -> EncoderFault | None:
        """The first text that the reference encodes differently; waits for the reference."""
        for texts, answer, own in self._open:
            found = first_mismatch(texts, answer(), own)
            if found is not None:
                return EncoderFault("other ids than tokenizers", found)
        return None


def sample_numbers(count: int, seed: int, *, first: int = 0) -> list[int]:
    """Which of `count` texts are compared, in order: one in each block of CHECKED_EVERY, chosen by
    the seed, and the first ones."""
    blocks = np.arange(-(-count // CHECKED_EVERY))
    drawn: NDArray[np.int64] = blocks * CHECKED_EVERY
    drawn += (hash64_array(blocks, seed) % np.uint64(CHECKED_EVERY)).astype(np.int64)
    return sorted({*range(min(first, count)), *drawn[drawn < count].tolist()})
