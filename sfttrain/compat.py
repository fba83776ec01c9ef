"""Dependence on internals of other libraries and the interpreter, in one place.

| used by               | internal                                     | tested with         |
|-----------------------|----------------------------------------------|---------------------|
| packed.forward        | `find_packed_sequence_indices` of            | transformers 5.23.0 |
|                       | `transformers.masking_utils`                 |                     |
| models.clone_template | the bytecode instruction `UNPACK_SEQUENCE`   | CPython 3.11        |

`tests/sfttrain/test_compat.py` fails when one of these no longer exists. Without them, everything
still works: forwards are slower, and the result of `clone_chat_template` has three values.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import FrameType

from torch import Tensor

SEARCH_NAME = "find_packed_sequence_indices"
"""The function of `transformers.masking_utils` that searches the position_ids of a row for the
starts of sequences."""


@contextlib.contextmanager
def skip_sequence_search() -> Iterator[None]:
    """Keep transformers from searching position_ids for sequences in this context.

    The search serves a mask that attention with explicit offsets does not use. It reads the result
    on the host, so every forward would wait for the device.
    """
    from transformers import masking_utils

    namespace = vars(masking_utils)
    search = namespace.get(SEARCH_NAME)
    if search is None:  # another version of transformers, which has no such search or renamed it
        yield
        return
    namespace[SEARCH_NAME] = _find_no_sequences
    try:
        yield
    finally:
        namespace[SEARCH_NAME] = search


def _find_no_sequences(position_ids: Tensor) -> None:
    """Return None, so that a mask treats each row as one sequence."""


def count_unpacked_values(frame: FrameType) -> int | None:
    """Return the number of variables in the running unpacking of a frame.

    It is the number of variables to which the running statement unpacks a value.

    Args:
        frame: The frame of the caller, `sys._getframe(1)` in an `__iter__`.

    Returns:
        2 for `a, b = value`; None if the running instruction is not an unpacking, as in
        `list(value)` or `a, *b = value`, or if the interpreter is not CPython.
    """
    code, offset = frame.f_code.co_code, frame.f_lasti
    if sys.implementation.name != "cpython" or not 0 <= offset < len(code) - 1:
        return None
    from dis import opmap

    # An instruction is two bytes: the operation, and its argument, here the number of variables.
    return code[offset + 1] if code[offset] == opmap["UNPACK_SEQUENCE"] else None
