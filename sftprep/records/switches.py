"""Switches of messages: the keys for training them, with a weight or not at all."""

from __future__ import annotations

import math
from typing import Any

from sftprep.core.types import Message
from sftprep.records.options import InvalidRecord

_WEIGHTS = ("weight", "train", "loss_weight")
_BOOLEANS = ("training", "trainable", "loss", "loss_mask")

SWITCH_KEYS = frozenset((*_WEIGHTS, *_BOOLEANS))
"""The switches of OpenAI (weight), axolotl (train, training), LLaMA-Factory (loss_weight) and
ms-swift (loss), and two others in use."""


def read_switches(messages: list[Message]) -> list[float | None] | None:
    """Return the weights of messages in the loss, or None if none is specified.

    A switch that is null is absent.

    Raises:
        InvalidRecord: A switch has an invalid value, or two switches of a message contradict each
            other.
    """
    if all(map(SWITCH_KEYS.isdisjoint, messages)):
        return None
    weights = [_message_weight(message, number) for number, message in enumerate(messages, 1)]
    return None if weights.count(None) == len(weights) else weights


def _message_weight(message: Message, number: int) -> float | None:
    found: dict[str, float] = {}
    for key in SWITCH_KEYS.intersection(message):
        value = message[key]
        if value is None:
            continue
        if not _is_valid(key, value):
            expected = "a non-negative number" if key in _WEIGHTS else "true or false"
            raise InvalidRecord(
                "bad_type", f'"{key}" of message {number} is {value!r}, not {expected}'
            )
        # A boolean is an int in Python, so `train: true` is the weight 1.
        found[key] = float(value)
    if len(set(found.values())) > 1:
        shown = " and ".join(f'"{key}": {message[key]}' for key in sorted(found))
        raise InvalidRecord("bad_row", f"message {number} has {shown}, which contradict each other")
    return next(iter(found.values()), None)


def _is_valid(key: str, value: Any) -> bool:
    if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        return False
    # A number such as `"loss": 1.73` is a result of training, not a switch.
    return key in _WEIGHTS or value in (0, 1)
