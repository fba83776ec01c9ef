"""Switches of messages: the keys for training them, with a weight or not at all."""

from __future__ import annotations

import json
import math
from functools import lru_cache
from typing import Any

from sftprep.core.types import Message
from sftprep.records.keys.pair_keys import split_key
from sftprep.records.options import InvalidRecord
from sftprep.records.roles import to_role

_WEIGHTS = ("weight", "train", "loss_weight")
_BOOLEANS = ("training", "trainable", "loss", "loss_mask")

SWITCH_KEYS = frozenset((*_WEIGHTS, *_BOOLEANS))
"""The switches of OpenAI (weight), axolotl (train, training), LLaMA-Factory (loss_weight) and
ms-swift (loss), and two others in use."""

_SWITCH_WORDS = frozenset(
    {
        *("mask", "masks", "masked", "masking", "unmask", "unmasked", "lossmask"),
        *("loss", "losses", "grad", "gradient", "backprop", "supervise", "supervised"),
        *("train", "trained", "trainable", "training", "untrain", "untrained", "untrainable"),
        *("learn", "learned", "learnable", "learning", "unlearn", "unsupervised", "supervision"),
        *("ignore", "ignored", "ignoring", "exclude", "excluded", "include", "included"),
        *("skip", "skipped", "omit", "omitted", "drop", "dropped", "freeze", "frozen"),
    }
)
"""Words of keys that select what is trained."""
_AMBIGUOUS_WORDS = frozenset({"target", "targets", "weight", "weights", "label", "labels"})
"""Words of such keys whose text has another meaning, such as a class."""
_RESULT_WORDS = frozenset(
    {
        *("step", "steps", "epoch", "epochs", "id", "ids", "idx", "index", "count", "num"),
        *("number", "split", "set", "name", "time", "date", "version", "rate", "file", "path"),
        *("size", "length", "len", "fold"),
    }
)
"""Words of keys with a number that describes a record, such as `train_step`."""
_SWITCH_TEXTS = frozenset({"true", "false", "yes", "no", "on", "off", "0", "1", "none", "all"})
"""Texts that are values of switches, in lower case; the names of roles are others."""


def is_switch(key: str, value: Any) -> bool:
    """Return whether a key with this value appears to select what is trained.

    Example:
        ("isTrainable", False), ("loss_weights", [0, 1]), ("mask", "assistant")  ->  True
        ("train_step", 0), ("loss", 1.73), ("skip", "the first page")            ->  False
    """
    if not has_switch_name(key):
        return False
    words = split_key(key)
    values = value if isinstance(value, list) else [value]
    is_weight = not words.isdisjoint(("weight", "weights", "scale"))
    return bool(values) and all(
        _is_switch_value(item, is_weight, is_certain=not words.isdisjoint(_SWITCH_WORDS))
        for item in values
    )


@lru_cache(maxsize=4096)
def has_switch_name(key: str) -> bool:
    """Return whether the words of a key suggest that it selects what is trained."""
    words = split_key(key)
    return words.isdisjoint(_RESULT_WORDS) and not words.isdisjoint(
        _SWITCH_WORDS | _AMBIGUOUS_WORDS
    )


def _is_switch_value(value: Any, is_weight: bool, *, is_certain: bool) -> bool:
    if isinstance(value, str):
        text = value.strip().lower()
        return is_certain and (text in _SWITCH_TEXTS or to_role(text) is not None)
    # Other numbers are results, such as `"loss": 1.73`.
    return isinstance(value, int | float) and (is_weight or value in (0, 1))


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
                "bad_type", f'"{key}" of message {number} is {json.dumps(value)}, not {expected}'
            )
        # A boolean is an int in Python, so `train: true` is the weight 1.
        found[key] = float(value)
    if len(set(found.values())) > 1:
        shown = " and ".join(f'"{key}": {json.dumps(message[key])}' for key in sorted(found))
        raise InvalidRecord("bad_row", f"message {number} has {shown}, which contradict each other")
    return next(iter(found.values()), None)


def _is_valid(key: str, value: Any) -> bool:
    if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        return False
    # A number such as `"loss": 1.73` is a result of training, not a switch.
    return key in _WEIGHTS or value in (0, 1)
