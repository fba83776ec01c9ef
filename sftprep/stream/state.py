"""What a state of a stream has to look like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sftprep.errors import ConfigError

_NAMES = {"version", "stream", "epoch", "lanes"}


def states_of(given: Any) -> list[Mapping[str, Any]]:
    """One state, or those of several ranks, as a list. Raises ConfigError for anything else, and
    for an empty list."""
    states = [given] if isinstance(given, Mapping) else given
    if not isinstance(states, (list, tuple)) or not states:
        raise _mangled(f"it is {_shown(given)}")
    for one in states:
        if not isinstance(one, Mapping) or not one.keys() >= _NAMES:
            raise _mangled(f"it is {_shown(one)}")
    return list(states)


def check_state(state: Mapping[str, Any], lanes: int) -> None:
    """Raise ConfigError where a state is not built as `state_dict` builds them. lanes: how many the
    stream has.

    Cursors are not looked into: they belong to the source.
    """
    if not _is_count(state.get("epoch")):
        raise _mangled(f"epoch is {_shown(state.get('epoch'))}")
    if not isinstance(state.get("lanes"), Mapping):
        raise _mangled(f"lanes is {_shown(state.get('lanes'))}")
    for name, lane in state["lanes"].items():
        if not str(name).isdecimal() or int(name) >= lanes:
            raise _mangled(f"it has a lane {name!r}")
        if (
            not isinstance(lane, Mapping)
            or not _is_count(lane.get("taken"))
            or not isinstance(lane.get("ended"), bool)
        ):
            raise _mangled(f"lane {name} is {_shown(lane)}")
        if "window" not in lane or not (lane["window"] is None or _is_window(lane["window"])):
            raise _mangled(f"the window of lane {name} is {_shown(lane.get('window'))}")


def _mangled(what: str) -> ConfigError:
    return ConfigError(
        f"this is no state of a stream: {what}", remedy="give what state_dict() returned, as it was"
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_window(window: Any) -> bool:
    if (
        not isinstance(window, Mapping)
        or not {"taken", "number", "next", "dry", "blocks", "pool", "counts"} <= window.keys()
    ):
        return False
    blocks, pool, counts = window["blocks"], window["pool"], window["counts"]
    return (
        _is_count(window["taken"])
        and _is_count(window["number"])
        and isinstance(window["dry"], bool)
        and isinstance(blocks, (list, tuple))
        and all(
            _is_pair(block) and isinstance(block[1], str) and block[1].isascii() for block in blocks
        )
        and isinstance(pool, (list, tuple))
        and all(
            isinstance(pack, (list, tuple)) and all(_is_reference(ref, blocks) for ref in pack)
            for pack in pool
        )
        and isinstance(counts, Mapping)
        and all(_is_count(count) for count in counts.values())
    )


def _is_pair(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2


def _is_reference(ref: Any, blocks: Any) -> bool:
    """Whether it names a sequence of a block: the number of the block, and the number in it."""
    return (
        _is_pair(ref)
        and all(map(_is_count, ref))
        and ref[0] < len(blocks)
        and ref[1] < len(blocks[ref[0]][1])
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__} that is not as it should be"
