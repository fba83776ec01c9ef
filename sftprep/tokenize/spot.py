"""The check during a build: one text in a thousand is encoded by `tokenizers` too.

The first thousand texts of a process are not checked: the probe has compared the tokenizer, and a small build must not wait for
`tokenizers` to load (0.3 s for a large vocabulary). From then on each thousand has one, chosen by the seed.
"""

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
    seen: int,
    seed: int,
    every: int = EVERY,
) -> Mismatch | None:
    """Compare the texts whose turn it is; None where there is none, or where they are equal.

    tokens: what `encoder` gave for `texts`; reference: encodes with `tokenizers`, called only when there is something to check;
    seen: texts that this process has encoded before these.
    """
    if encoder.name == "tokenizers":
        return None
    numbers = spot_numbers(seen, len(texts), seed, every)
    if not numbers:
        return None
    chosen = [texts[number] for number in numbers]
    return first_mismatch(chosen, reference(chosen), flat_tokens([tokens.of(number) for number in numbers]))


def spot_numbers(seen: int, count: int, seed: int, every: int = EVERY) -> list[int]:
    """Which of `count` texts, from 0, are checked when `seen` came before: one in each block of `every`, but not in the first."""
    numbers = []
    for block in range(max(seen // every, 1), (seen + count - 1) // every + 1):
        number = block * every + _mixed(seed, block) % every - seen
        if 0 <= number < count:
            numbers.append(number)
    return numbers


def _mixed(seed: int, block: int) -> int:
    """SplitMix64 of both: a number without pattern, the same on every machine. Source: Steele, Lea and Flood, OOPSLA 2014."""
    mask = (1 << 64) - 1
    value = (seed + (block + 1) * 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)
