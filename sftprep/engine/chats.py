"""Plain conversations to texts: those between the same speakers, in the same order, have one shape
of their template.

Most of them are not even decoded one by one. Contents are joined as they are written, with what the
template writes around them, and decoded at once; where the tokenizer allows it, what is the same in
all of them is left out, and encoded once (framed.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from sftprep.chat.jinja import OUTPUT_FLOOR
from sftprep.chat.shapes import Conditions, Shape
from sftprep.chat.template import ChatTemplate
from sftprep.chat.written import Stripped, Writer, stripped
from sftprep.engine.framed import Framer, Framing
from sftprep.engine.recipe import Recipe
from sftprep.engine.texts import Texts
from sftprep.lookup import Letters
from sftprep.messages import ROLES, SHAREGPT_ROLES
from sftprep.sources.plain import Layout, Turns
from sftprep.suspects import in_order, suspect_contents
from sftprep.tokenize.fast import FastEncoder
from sftprep.tokenize.seams import seams_of

_MOST_SHAPES = 1_000
"""Conversations of further shapes are rendered one by one, and once there are so many, all are
forgotten: where hardly two conversations are alike, there is nothing to gain."""
_LONGEST_SHAPE = 500
"""Messages."""
_SURROGATE = re.compile("[\ud800-\udfff]")

_Key = tuple[Layout, bytes, bool]
"""How conversations are written, their speakers, and whether contents come first."""


class _Known(NamedTuple):
    """A shape. size: characters of its literals; stripped: None where its conversations are filled
    one by one; framing: None where their texts have to be made."""

    shape: Shape
    size: int
    stripped: Stripped | None
    framing: Framing | None


class Chats:
    """A recipe and its template, ready for plain conversations."""

    def __init__(self, recipe: Recipe, template: ChatTemplate) -> None:
        self._template = template
        self._seams = seams_of(recipe.tokenizer) if recipe.encoder == FastEncoder.name else None
        self._spanned = recipe.train_on == "assistant"
        escaped = recipe.escape_special
        self._suspects = (
            suspect_contents(recipe.tokenizer, escaped=escaped) if recipe.reject_suspects else None
        )
        self._forget()

    def _forget(self) -> None:
        self._framer = None if self._seams is None else Framer(self._seams)
        self._writer = Writer(b'["', b'","', b'"]')
        self._shapes: dict[_Key, _Known | None] = {}
        self._order = cache(
            lambda shape: self._writer.order(shape.literals[:-1], shape.literals[-1])
        )

    def texts(self, turns: Turns, layout: Layout, letters: Letters) -> Texts:
        """Those of conversations that have a shape and meet its conditions. letters: of the lines
        that they stand in."""
        which, shapes = self._sorted(turns, layout)
        # Only now, for each shape may add a condition.
        may_hold = letters.may_hold(self._template.conditions.absent)
        try:
            usable = np.array([each is not None for each in shapes], np.bool_)[which]
            usable &= ~self._left(turns, self._template.conditions, may_hold=may_hold)
            at_once = usable & _at_once(turns, which, shapes)
            made = self._together(turns, np.flatnonzero(at_once), which, shapes)
        except orjson.JSONDecodeError:
            readable = turns.readable()
            return Texts() if readable is turns else self.texts(readable, layout, letters)
        others = Texts()
        for number in np.flatnonzero(usable & ~at_once).tolist():
            each = shapes[which[number]]
            if each is not None:
                self._one(turns, number, each.shape, others)
        return made.with_others(others)

    def _sorted(
        self, turns: Turns, layout: Layout
    ) -> tuple[NDArray[np.int64], list[_Known | None]]:
        """The number of each conversation's shape, and the shapes; None where there is none."""
        speakers = [turns.speakers[first:last] for first, last in pairwise(turns.bounds.tolist())]
        keys = [*zip(speakers, turns.content_first.tolist(), strict=True)]
        if len(self._shapes) >= _MOST_SHAPES:
            self._forget()
        kinds = dict.fromkeys(keys)
        numbers = dict(zip(kinds, range(len(kinds)), strict=True))
        shapes = [self._shape((layout, *key)) for key in kinds]
        return np.fromiter(map(numbers.__getitem__, keys), np.int64, len(keys)), shapes

    def _left(self, turns: Turns, conditions: Conditions, *, may_hold: bool) -> NDArray[np.bool_]:
        """Conversations that the shapes are not good for: bool [n]."""
        if may_hold or self._suspects is not None or conditions.filled - {()}:
            broken = conditions.broken(turns.contents, may_hold=may_hold)
            broken += self._suspects(turns.contents) if self._suspects is not None else []
        else:
            broken = np.flatnonzero(turns.first == turns.last).tolist() if conditions.filled else []
        return turns.conversations(broken)

    def _together(
        self,
        turns: Turns,
        chosen: NDArray[np.int64],
        which: NDArray[np.int64],
        shapes: Sequence[_Known | None],
    ) -> Texts:
        """The texts of these conversations, made of their contents as they are written."""
        known = [
            each
            for each in (shapes[number] for number in which[chosen].tolist())
            if each is not None
        ]
        framings = [each.framing for each in known if each.framing is not None]

        def kept() -> int:
            return self._template.counted(
                [each.shape for each in known], lambda place: turns.contents_of(chosen[place])
            )

        if self._framer is not None and framings and len(framings) == len(known):
            framed, count = self._framer.framed(turns, chosen, framings), kept()
            if count < len(known):
                return (
                    Texts(framed=(self._framer.framed(turns, chosen[:count], framings[:count]),))
                    if count
                    else Texts()
                )
            return Texts(framed=(framed,))
        made = Texts()
        if known:
            order = np.concatenate([self._order(each.shape) for each in known])
            texts, count = self._writer.read(order, turns.written(chosen)), kept()
            for number, text in zip(chosen[:count].tolist(), texts[:count], strict=True):
                made.add(int(turns.lines[number]), text, plain=False, spans=None, prompt=None)
        return made

    def _one(self, turns: Turns, number: int, shape: Shape, made: Texts) -> None:
        try:
            filled = self._template.fill(shape, turns.contents_of(number))
        except orjson.JSONDecodeError:
            return  # the general way says what it is
        if filled is not None:
            spans = filled.spans if self._spanned else None
            made.add(int(turns.lines[number]), filled.text, plain=False, spans=spans, prompt=None)

    def _shape(self, key: _Key) -> _Known | None:
        """The shape of such conversations."""
        if key not in self._shapes:
            layout, speakers, content_first = key
            if len(self._shapes) >= _MOST_SHAPES or len(speakers) > _LONGEST_SHAPE:
                return None
            roles = [_ROLE_OF[layout.names[number]] for number in speakers]
            usable = self._suspects is None or in_order(roles)
            # What sharegpt calls from and value is written anew, always in this order.
            content_first = content_first and layout.speaker == "role"
            shape = self._template.shape(roles, content_first=content_first) if usable else None
            self._shapes[key] = None if shape is None else self._prepared(shape)
        return self._shapes[key]

    def _prepared(self, shape: Shape) -> _Known:
        text = "".join(shape.literals)
        # JSON cannot write half of a surrogate pair.
        at_once = None if self._spanned or _SURROGATE.search(text) else stripped(shape)
        framing = None if at_once is None or self._framer is None else self._framer.framing(shape)
        return _Known(shape, len(text), at_once, framing)


def _at_once(
    turns: Turns, which: NDArray[np.int64], shapes: Sequence[_Known | None]
) -> NDArray[np.bool_]:
    """Conversations whose texts can be made of their contents as they are written: bool [n]."""
    able = np.array([each is not None and each.stripped is not None for each in shapes], np.bool_)
    sizes = np.array([0 if each is None else each.size for each in shapes], np.int64)
    chosen: NDArray[np.bool_] = able[which] & (turns.sizes() + sizes[which] <= OUTPUT_FLOOR)
    chosen &= ~turns.conversations(np.flatnonzero(turns.may_end_early()))
    for number, each in enumerate(shapes):
        if each is not None and each.stripped is not None:
            for places, are_letters in (
                (each.stripped.begins, turns.begins),
                (each.stripped.ends, turns.ends),
            ):
                if places:
                    rows = np.flatnonzero(which == number)
                    chosen[rows] &= are_letters[turns.bounds[rows][:, None] + np.array(places)].all(
                        axis=1
                    )
    return chosen


def layouts(format_name: str, key: str) -> list[Layout]:
    """How conversations of a format may be written. key: that of the list; a function call of
    sharegpt is more than text."""
    openai = Layout(key, "role", "content", tuple(sorted(ROLES)))
    if format_name != "sharegpt":
        return [openai]
    return [
        Layout(
            key,
            "from",
            "value",
            tuple(name for name, role in SHAREGPT_ROLES.items() if role in ROLES),
        ),
        openai,
    ]


_ROLE_OF = {**{role: role for role in ROLES}, **SHAREGPT_ROLES}
