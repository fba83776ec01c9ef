"""The check during a build: one text in each thousand, and the first ones of all, are encoded by `tokenizers` too."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sftprep.tokenize.tokens import Encoder, Mismatch, Tokens, first_mismatch, flat_tokens

EVERY = 1000


def spot_check(
    encoder: Encoder,
    reference: Callable[[Sequence[str]], Tokens],
    texts: Sequence[str],
    tokens: Tokens,
    *,
    seed: int,
    first: int = 0,
    every: int = EVERY,
) -> Mismatch | None:
    """Compare the texts whose turn it is; None where they are equal.

    tokens: what `encoder` gave for `texts`; reference: encodes with `tokenizers`, called only when there is something to check;
    first: so many texts at the start are checked as well.
    """
    numbers = [] if encoder.name == "tokenizers" else spot_numbers(len(texts), seed, first=first, every=every)
    if not numbers:
        return None
    chosen = [texts[number] for number in numbers]
    return first_mismatch(chosen, reference(chosen), flat_tokens([tokens.of(number) for number in numbers]))


def spot_numbers(count: int, seed: int, *, first: int = 0, every: int = EVERY) -> list[int]:
    """Which of `count` texts are checked, in order: one in each block of `every`, chosen by the seed, and the first ones."""
    numbers = set(range(min(first, count)))
    for block in range(-(-count // every)):
        number = block * every + _mixed(seed, block) % every
        if number < count:
            numbers.add(number)
    return sorted(numbers)


def _mixed(seed: int, block: int) -> int:
    """SplitMix64 of both: a number without pattern, the same on every machine. Source: Steele, Lea and Flood, OOPSLA 2014."""
    mask = (1 << 64) - 1
    value = (seed + (block + 1) * 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)
