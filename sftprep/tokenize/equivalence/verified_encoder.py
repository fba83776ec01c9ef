"""The verified encoder: the encoder of a build, with a spot check.

The reference encoder makes the spot check.

The probe compares the encoders before a build. The spot check compares them on the data itself:

1. The seed of a partition draws one of every SAMPLE_INTERVAL texts; the first texts of an input are
   added.
2. The reference encoder encodes the sample in a child process, while this process continues.
3. At the end of the partition, `PartitionEncoder.verify` compares. If an id differs, the caller
   encodes the whole partition with the reference encoder.

Cost: 0.1 % of the texts are encoded twice, on another core.
"""

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

SAMPLE_INTERVAL = 1_000
"""One of this many texts is compared."""

_log = logging.getLogger(__name__)


class VerifiedEncoder:
    """The encoder of a recipe, loaded once and used for many partitions.

    Args:
        spec: The tokenizer.
        name: The name of the encoder, a key of `ENCODERS`.
        threads: Whether it may use every core, and start a child process for the spot check.
    """

    def __init__(self, spec: TokenizerSpec, name: str, *, threads: bool) -> None:
        self.spec, self._name, self._threads = spec, name, threads
        self._load_reference = cache(partial(HfEncoder, spec, threads=threads))
        self._address: ServerAddress | None = None  # the child that encodes the samples
        self._server: ReferenceServer | None = None  # keeps a child of this process running
        self._client: ReferenceClient | None = None  # made when the first samples are encoded
        self._reported = False  # whether a fault was logged

    @cached_property
    def fast(self) -> Encoder:
        """Return the encoder with the name of the recipe.

        Raises:
            EncoderFault: It cannot be loaded.
        """
        return load_encoder(
            self.spec, self._name, threads=self._threads, reference=self._load_reference
        )

    @property
    def reference(self) -> Encoder:
        """Return the reference encoder in this process."""
        return self._load_reference()

    def use_server(self, address: ServerAddress | None) -> None:
        """Encode samples with the child of another process; None changes nothing."""
        if address is not None and address != self._address:
            self._address, self._client = address, None

    def partition(self, *, seed: int | None, num_first: int = 0) -> PartitionEncoder:
        """Return the encoder for one partition.

        Args:
            seed: Draws the texts to compare, one of SAMPLE_INTERVAL; None to compare nothing.
            num_first: Number of texts at the start of the partition to compare as well.
        """
        compared = seed is not None and self._name != HfEncoder.name
        if compared and num_first:
            self._start_client()  # the child loads while this process reads the partition
        return PartitionEncoder(self, seed or 0, num_first, compared=compared)

    def partition_by_reference(self) -> PartitionEncoder:
        """Return the reference encoder for one partition."""
        return PartitionEncoder(self, 0, 0, compared=False, by_reference=True)

    def report(self, fault: EncoderFault) -> None:
        """Log the first fault of this process; the caller counts all of them."""
        if not self._reported:
            self._reported = True
            _log.warning("%s is not used for a part of the records: %s", self._name, fault)

    def _start_client(self) -> ReferenceClient:
        if self._client is None:
            # A worker uses the child of the build; a single process starts one of its own.
            if self._address is None and self._threads and self._name != HfEncoder.name:
                self._server = ReferenceServer(self.spec)
                self._address = self._server.address
            self._client = ReferenceClient(self._address, self._load_reference)
        return self._client

    def ask_reference(self, texts: Sequence[str]) -> Callable[[], Tokens]:
        """Start encoding texts by the reference, and return a function for the result."""
        return self._start_client().ask(texts)


class PartitionEncoder:
    """The encoder for the texts of one partition, with samples for comparison.

    It keeps the samples until they are compared.

    Args:
        encoder: The encoder of the recipe.
        seed: Draws the texts to compare.
        num_first: Number of texts at the start to compare as well.
        compared: Whether texts are compared at all.
        by_reference: Whether to use the reference encoder.

    Attributes:
        samples: Indices of the texts in the last call of `encode` that are compared.
    """

    def __init__(
        self,
        encoder: VerifiedEncoder,
        seed: int,
        num_first: int,
        *,
        compared: bool,
        by_reference: bool = False,
    ) -> None:
        self._encoder, self._by_reference = encoder, by_reference
        self._seed, self._num_first, self._compared = seed, num_first, compared
        # Texts, a function that waits for their ids by the reference encoder, and their tokens.
        self._pending: list[tuple[list[str], Callable[[], Tokens], Tokens]] = []
        self.samples: list[int] = []

    @property
    def encoder(self) -> Encoder:
        """Return the encoder without the spot check."""
        return self._encoder.reference if self._by_reference else self._encoder.fast

    def encode(self, texts: Sequence[str]) -> Tokens:
        """Return the ids of each text.

        Raises:
            EncoderFault: The encoder cannot be loaded, or fails.
            TokenizerError: A text cannot be encoded.
        """
        self.samples = []
        if self._compared:
            self.samples = sample_numbers(len(texts), self._seed, num_first=self._num_first)
            self._num_first = max(0, self._num_first - len(texts))
        sample = [texts[index] for index in self.samples]
        # Requested before this process encodes, so that both happen in parallel.
        wait_for_reference = self._encoder.ask_reference(sample) if sample else None
        tokens = self.encoder.encode(texts)
        if wait_for_reference is not None:
            self._pending.append((sample, wait_for_reference, tokens.take(self.samples)))
        return tokens

    def verify(self) -> EncoderFault | None:
        """Return the first sample with other ids from the reference, or None.

        This waits for the reference encoder.
        """
        for texts, wait_for_reference, tokens in self._pending:
            mismatch = first_mismatch(texts, wait_for_reference(), tokens)
            if mismatch is not None:
                return EncoderFault("other ids than tokenizers", mismatch)
        return None


def sample_numbers(count: int, seed: int, *, num_first: int = 0) -> list[int]:
    """Return the indices of the texts to compare, ascending.

    One text is drawn from each block of SAMPLE_INTERVAL texts.

    Args:
        count: The number of texts.
        seed: Determines which ones are drawn.
        num_first: Number of texts at the start to compare as well.
    """
    blocks = np.arange(-(-count // SAMPLE_INTERVAL))
    drawn: NDArray[np.int64] = blocks * SAMPLE_INTERVAL
    drawn += (hash64_array(blocks, seed) % np.uint64(SAMPLE_INTERVAL)).astype(np.int64)
    return sorted({*range(min(num_first, count)), *drawn[drawn < count].tolist()})
