"""The structure of the states of a stream, and the checks of loaded states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sftprep.errors import ConfigError

_NAMES = {"version", "stream", "epoch", "lanes"}
_WINDOW_NAMES = {"taken", "number", "next", "dry", "blocks", "pool", "counts"}


def states_of(states: Any) -> list[Mapping[str, Any]]:
    """Return one state, or the states of several ranks, as a list.

    Raises:
        ConfigError: The argument is something else, or an empty list.
    """
    listed = [states] if isinstance(states, Mapping) else states
    if not isinstance(listed, (list, tuple)) or not listed:
        raise _invalid_state(f"it is {_describe(states)}")
    for state in listed:
        # Further keys are ignored.
        if not isinstance(state, Mapping) or not state.keys() >= _NAMES:
            raise _invalid_state(f"it is {_describe(state)}")
    return list(listed)


def check_state(state: Mapping[str, Any], lanes: int) -> None:
    """Raise ConfigError unless a state has the structure of `state_dict`.

    Cursors are not checked, since only their source knows their structure.

    Args:
        state: The state of a stream.
        lanes: The number of lanes of the stream.
    """
    if not _is_count(state.get("epoch")):
        raise _invalid_state(f"epoch is {_describe(state.get('epoch'))}")
    if not isinstance(state.get("lanes"), Mapping):
        raise _invalid_state(f"lanes is {_describe(state.get('lanes'))}")
    for name, lane in state["lanes"].items():
        if not str(name).isdecimal() or int(name) >= lanes:
            raise _invalid_state(f"it has a lane {name!r}")
        if (
            not isinstance(lane, Mapping)
            or not _is_count(lane.get("taken"))
            or not isinstance(lane.get("ended"), bool)
        ):
            raise _invalid_state(f"lane {name} is {_describe(lane)}")
        if "window" not in lane or not (lane["window"] is None or _is_window(lane["window"])):
            raise _invalid_state(f"the window of lane {name} is {_describe(lane.get('window'))}")


def first_cursor(state: Mapping[str, Any] | None) -> Any:
    """Return the cursor of the first block of a lane to be read.

    Return None to start at its first block.
    """
    window = state["window"] if state is not None else None
    if window is None:
        return None
    return window["blocks"][0][0] if window["blocks"] else window["next"]


def _invalid_state(description: str) -> ConfigError:
    return ConfigError(
        f"this is not a state of a stream: {description}",
        remedy="pass the result of state_dict() without changes",
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_window(window: Any) -> bool:
    if not isinstance(window, Mapping) or not window.keys() >= _WINDOW_NAMES:
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
    """Return whether a value is a pair of block index and sequence index."""
    return (
        _is_pair(ref)
        and all(map(_is_count, ref))
        and ref[0] < len(blocks)
        and ref[1] < len(blocks[ref[0]][1])
    )


def _describe(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__} with an unexpected structure"
