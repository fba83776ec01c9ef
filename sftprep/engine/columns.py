"""Plain lines to texts, column by column: what pass 1 does with most lines of most files, and the same texts as the general way.

A line is plain where its JSON has the plainest shape (sources/plain.py), its record needs nothing but its texts, and, for a
conversation, the template treats all of its shape alike (chat/shapes.py). All other lines are left to the general way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import orjson

from sftprep.chat.shapes import Conditions, Shape
from sftprep.chat.template import ChatTemplate, Rendered
from sftprep.chat.written import WrittenShape, fill_written, written_shape
from sftprep.engine.recipe import Recipe
from sftprep.engine.texts import Texts, closing
from sftprep.errors import TemplateError
from sftprep.lookup import Letters
from sftprep.messages import ROLES, SHAREGPT_ROLES
from sftprep.reading import Reading
from sftprep.records import keys_of, keys_read
from sftprep.sources.plain import Layout, PlainLines, Turns
from sftprep.suspects import in_order, suspect_contents

_MOST_SHAPES = 1_000
"""Conversations of further shapes are rendered one by one: where hardly two are alike, there is nothing to gain."""
_WORTH = 2
"""Conversations of one shape in a partition from which on it is made: to make one takes as long as to render several."""
_LONGEST_SHAPE = 500
"""Messages."""


class Columns:
    """A recipe, ready for plain lines."""

    def __init__(self, recipe: Recipe, reading: Reading, template: ChatTemplate | None) -> None:
        """template: renders conversations as they are; None where single messages of them count."""
        self._template = template
        self._spanned = recipe.train_on == "assistant"
        self._prompted = recipe.train_on != "all"
        self._reading = reading
        self._end = closing(recipe.tokenizer)
        self._targets = {target: source for source, target in reading.renames}
        self._looked = (keys_read(reading) or frozenset()) | self._targets.keys()
        sources = [source for source, _ in reading.renames]
        # A chain of renames, or two of one name, is for the general way.
        chained = len(self._targets) < len(sources) or len({*sources, *self._targets}) < 2 * len(sources)
        self._renamed = frozenset(sources)
        self._idle = chained or reading.function is not None or recipe.expand_turns
        escaped = recipe.escape_special
        self._suspects = suspect_contents(recipe.tokenizer, escaped=escaped) if recipe.reject_suspects else None
        self._shapes: dict[tuple[Layout, bytes], _Known | None] = {}

    def texts(self, data: bytes, letters: Letters, format_name: str, counts: Counter[str]) -> Texts:
        """The texts of plain lines, layout by layout; none where there is no such line.

        letters: of the data; counts: what is counted of them.
        """
        made = Texts()
        template = self._template if format_name in _LAYOUTS else None
        if self._idle or (template is None and format_name not in ("text", "prompt-completion")):
            return made
        if not self._renamed.isdisjoint(keys_of(format_name, self._reading)):
            return made  # what is renamed to something else is no longer there
        try:
            lines = PlainLines(data)
        except UnicodeDecodeError:
            return made
        if template is not None:
            key = self._source("conversations" if format_name == "sharegpt" else "messages")
            for speaker, content, names in _LAYOUTS[format_name]:
                layout = Layout(key, speaker, content, names)
                own = Texts()
                self._chats(letters, lines.turns(layout, self._looked - {key}), layout, template, own)
                made = made.with_others(own)
        elif format_name == "text":
            self._plain_texts(lines, made)
        else:
            self._completions(lines, made, counts)
        return made

    def _source(self, key: str) -> str:
        """The key under which records hold what `key` names."""
        return self._targets.get(key, key)

    def _chats(self, letters: Letters, turns: Turns, layout: Layout, template: ChatTemplate, made: Texts) -> None:
        keys = [turns.speakers[first:last] for first, last in pairwise(turns.bounds.tolist())]
        shapes = {key: self._shape(layout, key, times, template) for key, times in Counter(keys).items()}
        known = [shapes[key] for key in keys]
        # Only now, for each shape may add a condition.
        may_hold = letters.may_hold(template.conditions.absent)
        try:
            left = self._left(turns, template.conditions, may_hold=may_hold)
            at_once = self._at_once(turns, known, left)
            texts = fill_written(at_once.values(), turns.written(at_once))
        except orjson.JSONDecodeError:
            self._chats(letters, turns.readable(), layout, template, made)
            return
        written = dict(zip(at_once, texts, strict=True))
        for number, (line, shape) in enumerate(zip(turns.lines.tolist(), known, strict=True)):
            if shape is None or number in left:
                continue
            text = written.get(number)
            contents = partial(turns.contents_of, number)
            try:
                if text is None:
                    filled = template.fill(shape.shape, contents())
                else:
                    whole = template.filled(shape.shape, text, contents)
                    filled = None if whole is None else Rendered(whole, ())
            except TemplateError:
                continue
            if filled is not None:
                made.texts.append(filled.text)
                made.origin.append(line)
                made.spans.append(filled.spans if self._spanned else None)
        made.plain += [False] * (len(made.texts) - len(made.plain))

    def _left(self, turns: Turns, conditions: Conditions, *, may_hold: bool) -> set[int]:
        """Conversations that the shapes are not good for."""
        if may_hold or self._suspects is not None or conditions.filled - {()}:
            broken = conditions.broken(turns.contents, may_hold=may_hold)
            broken += self._suspects(turns.contents) if self._suspects is not None else []
        else:
            broken = np.flatnonzero(turns.first == turns.last).tolist() if conditions.filled else []
        return turns.conversations(broken)

    def _at_once(self, turns: Turns, known: Sequence[_Known | None], left: set[int]) -> dict[int, WrittenShape]:
        """The shapes of the conversations whose texts can be made of their contents as they are written, in order."""
        left = left | turns.conversations(np.flatnonzero(turns.may_end_early()).tolist())
        begins = ends = None
        chosen: dict[int, WrittenShape] = {}
        for number, shape in enumerate(known):
            if shape is None or shape.written is None or number in left:
                continue
            if shape.written.begins or shape.written.ends:
                if begins is None or ends is None:
                    begins, ends = turns.begin_with_letter(), turns.end_with_letter()
                place = int(turns.bounds[number])
                if not all(begins[place + k] for k in shape.written.begins):
                    continue
                if not all(ends[place + k] for k in shape.written.ends):
                    continue
            chosen[number] = shape.written
        return chosen

    def _shape(self, layout: Layout, key: bytes, times: int, template: ChatTemplate) -> _Known | None:
        """The shape of conversations between these speakers, of which there are so many now."""
        known = (layout, key)
        if known not in self._shapes:
            if times < _WORTH or len(self._shapes) >= _MOST_SHAPES or len(key) > _LONGEST_SHAPE:
                return None
            roles = [_ROLE_OF[layout.names[number]] for number in key]
            usable = self._suspects is None or in_order(roles)
            shape = template.shape(roles) if usable else None
            self._shapes[known] = _Known(shape, None if self._spanned else written_shape(shape)) if shape else None
        return self._shapes[known]

    def _plain_texts(self, lines: PlainLines, made: Texts) -> None:
        key = self._source(self._reading.text_field)
        fields = lines.fields([key], self._looked - {key})
        end = self._end
        self._add(fields.lines.tolist(), [text if text.endswith(end) else text + end for text in fields.values[key]], made)

    def _completions(self, lines: PlainLines, made: Texts, counts: Counter[str]) -> None:
        keys = self._source("prompt"), self._source("completion")
        fields = lines.fields(keys, self._looked - {*keys})
        prompts, completions = (fields.values[key] for key in keys)
        empty = sum(not completion or completion.isspace() for completion in completions)
        if empty:
            counts["warnings.empty_target"] += empty
        end = self._end
        texts = [f"{prompt}{own}{end}" for prompt, own in zip(prompts, completions, strict=True)]
        for number, own in enumerate(completions):
            # An end that is there already; it may have started in the prompt.
            if own.endswith(end) or (len(own) < len(end) and (prompts[number] + own).endswith(end)):
                texts[number] = prompts[number] + own
        self._add(fields.lines.tolist(), texts, made)
        if self._prompted:
            made.prompts, made.prompt_of = prompts, list(range(len(prompts)))

    def _add(self, lines: list[int], texts: list[str], made: Texts) -> None:
        made.texts, made.origin = texts, lines
        made.plain, made.spans = [True] * len(lines), [None] * len(lines)


class _Known(NamedTuple):
    """A shape, and the same for contents as they are written."""

    shape: Shape
    written: WrittenShape | None


_ROLE_OF = {**{role: role for role in ROLES}, **SHAREGPT_ROLES}
_OPENAI = ("role", "content", tuple(sorted(ROLES)))
_LAYOUTS = {
    "messages": [_OPENAI],
    "sharegpt": [("from", "value", tuple(name for name, role in SHAREGPT_ROLES.items() if role in ROLES)), _OPENAI],
}
"""Keys of a message that tell the speaker and the content, and the speakers; a function call of sharegpt is more than text."""
