"""Plain conversations to texts: those between the same speakers, in the same order, have one shape of their template.

Most of them are not even decoded one by one. Contents are joined as they are written, with what the template writes around them,
and decoded at once; where the tokenizer allows it, what is the same in all of them is left out, and encoded once (framed.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from sftprep.chat.jinja import OUTPUT_FLOOR
from sftprep.chat.shapes import Conditions, Shape
from sftprep.chat.template import ChatTemplate
from sftprep.chat.written import Stripped, Writer, stripped
from sftprep.engine.framed import Framed, Framer, Framing
from sftprep.engine.recipe import Recipe
from sftprep.engine.texts import Texts
from sftprep.errors import TemplateError
from sftprep.lookup import Letters
from sftprep.messages import ROLES, SHAREGPT_ROLES
from sftprep.sources.plain import Layout, Turns
from sftprep.suspects import in_order, suspect_contents
from sftprep.tokenize.fast import FastEncoder
from sftprep.tokenize.seams import seams_of

_MOST_SHAPES = 1_000
"""Conversations of further shapes are rendered one by one: where hardly two are alike, there is nothing to gain."""
_WORTH = 2
"""Conversations of one shape, from which on it is made: to make one takes as long as to render several."""
_MOST_SEEN = 10_000
"""Shapes that are counted while they are not worth it yet."""
_LONGEST_SHAPE = 500
"""Messages."""


_Key = tuple[Layout, bytes, bool]
"""How conversations are written, their speakers, and whether contents come first."""


class _Known(NamedTuple):
    """A shape. size: characters of its literals; stripped and order: None where its conversations are filled one by one."""

    shape: Shape
    size: int
    stripped: Stripped | None
    order: NDArray[np.int64] | None
    framing: Framing | None


class Chats:
    """A recipe and its template, ready for plain conversations."""

    def __init__(self, recipe: Recipe, template: ChatTemplate) -> None:
        self._template = template
        self._spanned = recipe.train_on == "assistant"
        escaped = recipe.escape_special
        self._suspects = suspect_contents(recipe.tokenizer, escaped=escaped) if recipe.reject_suspects else None
        seams = seams_of(recipe.tokenizer) if recipe.encoder == FastEncoder.name else None
        self._framer = None if seams is None else Framer(seams)
        self._writer = Writer(b'["', b'","', b'"]')
        self._shapes: dict[_Key, _Known | None] = {}
        self._seen: Counter[_Key] = Counter()

    def texts(self, turns: Turns, layout: Layout, letters: Letters) -> Texts:
        """Those of conversations that have a shape and meet its conditions. letters: of the lines that they stand in."""
        keys = [
            (layout, turns.speakers[first:last], content_first)
            for (first, last), content_first in zip(pairwise(turns.bounds.tolist()), turns.content_first.tolist(), strict=True)
        ]
        shapes = {key: self._shape(key, times) for key, times in Counter(keys).items()}
        known = [shapes[key] for key in keys]
        # Only now, for each shape may add a condition.
        may_hold = letters.may_hold(self._template.conditions.absent)
        try:
            left = self._left(turns, self._template.conditions, may_hold=may_hold)
            chosen = self._at_once(turns, known, left)
            made = Texts()
            framings = {number: each.framing for number, each in chosen.items() if each.framing}
            if self._framer is not None and framings and len(framings) == len(chosen):
                made.framed = self._framed(turns, framings, self._framer)
            else:
                self._filled(turns, chosen, made)
        except orjson.JSONDecodeError:
            readable = turns.readable()
            return Texts() if readable is turns else self.texts(readable, layout, letters)
        others = Texts()
        for number, each in enumerate(known):
            if each is not None and number not in left and number not in chosen:
                self._one(turns, number, each.shape, others)
        return made.with_others(others)

    def _framed(self, turns: Turns, framings: dict[int, Framing], framer: Framer) -> tuple[Framed, ...]:
        made = framer.framed(turns, framings)
        kept = {number: each for number, each in framings.items() if self._counts(turns, number, each.shape)}
        if len(kept) == len(framings):
            return (made,)
        return (framer.framed(turns, kept),) if kept else ()

    def _filled(self, turns: Turns, chosen: dict[int, _Known], made: Texts) -> None:
        orders = [each.order for each in chosen.values() if each.order is not None]
        texts = self._writer.read(orders, turns.written(chosen)) if chosen else []
        for (number, each), text in zip(chosen.items(), texts, strict=True):
            if self._counts(turns, number, each.shape):
                made.add(int(turns.lines[number]), text, plain=False, spans=None, prompt=None)

    def _one(self, turns: Turns, number: int, shape: Shape, made: Texts) -> None:
        try:
            filled = self._template.fill(shape, turns.contents_of(number))
        except (TemplateError, orjson.JSONDecodeError):
            return  # the general way says what it is
        if filled is not None:
            spans = filled.spans if self._spanned else None
            made.add(int(turns.lines[number]), filled.text, plain=False, spans=spans, prompt=None)

    def _counts(self, turns: Turns, number: int, shape: Shape) -> bool:
        try:
            return self._template.counted(shape, partial(turns.contents_of, number))
        except TemplateError:
            return False

    def _left(self, turns: Turns, conditions: Conditions, *, may_hold: bool) -> set[int]:
        """Conversations that the shapes are not good for."""
        if may_hold or self._suspects is not None or conditions.filled - {()}:
            broken = conditions.broken(turns.contents, may_hold=may_hold)
            broken += self._suspects(turns.contents) if self._suspects is not None else []
        else:
            broken = np.flatnonzero(turns.first == turns.last).tolist() if conditions.filled else []
        return turns.conversations(broken)

    def _at_once(self, turns: Turns, known: Sequence[_Known | None], left: set[int]) -> dict[int, _Known]:
        """Conversations whose texts can be made of their contents as they are written."""
        left = left | turns.conversations(np.flatnonzero(turns.may_end_early()).tolist())
        sizes, begins, ends = turns.sizes().tolist(), None, None
        chosen: dict[int, _Known] = {}
        for number, each in enumerate(known):
            if each is None or each.stripped is None or number in left or sizes[number] + each.size > OUTPUT_FLOOR:
                continue
            if each.stripped.begins or each.stripped.ends:
                if begins is None or ends is None:
                    begins, ends = turns.begin_with_letter(), turns.end_with_letter()
                place = int(turns.bounds[number])
                if not all(begins[place + k] for k in each.stripped.begins):
                    continue
                if not all(ends[place + k] for k in each.stripped.ends):
                    continue
            chosen[number] = each
        return chosen

    def _shape(self, key: _Key, times: int) -> _Known | None:
        """The shape of such conversations, of which there are so many now."""
        if key not in self._shapes:
            layout, speakers, content_first = key
            if len(self._shapes) >= _MOST_SHAPES or len(speakers) > _LONGEST_SHAPE:
                return None
            if times + self._seen[key] < _WORTH:
                if len(self._seen) < _MOST_SEEN:
                    self._seen[key] = times
                return None
            del self._seen[key]
            roles = [_ROLE_OF[layout.names[number]] for number in speakers]
            usable = self._suspects is None or in_order(roles)
            # What sharegpt calls from and value is written anew, always in this order.
            content_first = content_first and layout.speaker == "role"
            shape = self._template.shape(roles, content_first=content_first) if usable else None
            self._shapes[key] = None if shape is None else self._prepared(shape)
        return self._shapes[key]

    def _prepared(self, shape: Shape) -> _Known:
        size = sum(map(len, shape.literals))
        at_once = None if self._spanned else stripped(shape)
        order = None if at_once is None else self._writer.order(shape.literals)
        if order is None:
            return _Known(shape, size, None, None, None)
        return _Known(shape, size, at_once, order, None if self._framer is None else self._framer.framing(shape))


def layouts(format_name: str, key: str) -> list[Layout]:
    """How conversations of a format may be written. key: that of the list; a function call of sharegpt is more than text."""
    openai = Layout(key, "role", "content", tuple(sorted(ROLES)))
    if format_name != "sharegpt":
        return [openai]
    return [Layout(key, "from", "value", tuple(name for name, role in SHAREGPT_ROLES.items() if role in ROLES)), openai]


_ROLE_OF = {**{role: role for role in ROLES}, **SHAREGPT_ROLES}
