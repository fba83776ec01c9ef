"""The check during a build: one text in each thousand, and the first ones of all, are encoded by `tokenizers` too."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sftprep.hashes import mixed_each
from sftprep.tokenize.tokens import Encoder, Mismatch, Tokens, first_mismatch, flat_tokens

EVERY = 1000


def spot_check(
    encoder: Encoder,
    ask: Callable[[Sequence[str]], Callable[[], Tokens]],
    texts: Sequence[str],
    *,
    seed: int,
    first: int = 0,
    every: int = EVERY,
) -> Callable[[Tokens], Mismatch | None]:
    """A comparison of the texts whose turn it is, for what `encoder` gives for all of them; it says None where they are equal.

    ask: has `tokenizers` encode some texts meanwhile (`Asking.ask`), called only when there is something to check; first: so many
    texts at the start are checked as well.
    """
    numbers = [] if encoder.name == "tokenizers" else spot_numbers(len(texts), seed, first=first, every=every)
    if not numbers:
        return lambda _: None
    chosen = [texts[number] for number in numbers]
    answer = ask(chosen)
    return lambda tokens: first_mismatch(chosen, answer(), flat_tokens([tokens.of(number) for number in numbers]))


def spot_numbers(count: int, seed: int, *, first: int = 0, every: int = EVERY) -> list[int]:
    """Which of `count` texts are checked, in order: one in each block of `every`, chosen by the seed, and the first ones."""
    blocks = np.arange(-(-count // every))
    drawn = blocks * every + (mixed_each(blocks, seed) % np.uint64(every)).astype(np.int64)
    return sorted({*range(min(first, count)), *drawn[drawn < count].tolist()})
