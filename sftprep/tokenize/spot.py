"""The check during a build: one text in each thousand, and the first ones of all, are encoded by
`tokenizers` too."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sftprep.hashes import mixed_each
from sftprep.tokenize.tokens import Mismatch, Tokens, first_mismatch, flat_tokens

EVERY = 1000


class SpotChecks:
    """The checks of one partition, whose answers are waited for at its end. ask: has `tokenizers`
    encode some texts meanwhile (`Asking.ask`), called only where there is something to check; None:
    nothing is; first: so many texts at the start are checked as well."""

    def __init__(
        self,
        ask: Callable[[Sequence[str]], Callable[[], Tokens]] | None,
        *,
        seed: int = 0,
        first: int = 0,
        every: int = EVERY,
    ) -> None:
        self._ask, self._seed, self._first, self._every = ask, seed, first, every
        self._open: list[tuple[list[str], Callable[[], Tokens], Tokens]] = []

    def begin(self, texts: Sequence[str]) -> Callable[[Tokens], None]:
        """Ask for the texts whose turn it is; what it returns is to be called with what the fast
        encoder gives for all."""
        numbers = spot_numbers(len(texts), self._seed, first=self._first, every=self._every)
        self._first = max(0, self._first - len(texts))
        if self._ask is None or not numbers:
            return lambda _: None
        chosen = [texts[number] for number in numbers]
        answer = self._ask(chosen)
        return lambda tokens: self._open.append(
            (chosen, answer, flat_tokens([tokens.of(number) for number in numbers]))
        )

    def mismatch(self) -> Mismatch | None:
        """The first text that the two encode differently, None where there is none; waits for the
        answers."""
        for texts, answer, got in self._open:
            found = first_mismatch(texts, answer(), got)
            if found is not None:
                return found
        return None


def spot_numbers(count: int, seed: int, *, first: int = 0, every: int = EVERY) -> list[int]:
    """Which of `count` texts are checked, in order: one in each block of `every`, chosen by the
    seed, and the first ones."""
    blocks = np.arange(-(-count // every))
    drawn = blocks * every + (mixed_each(blocks, seed) % np.uint64(every)).astype(np.int64)
    return sorted({*range(min(first, count)), *drawn[drawn < count].tolist()})
