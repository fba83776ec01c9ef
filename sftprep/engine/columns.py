"""Plain lines to texts, column by column: what pass 1 does with most lines of most files, and the
same texts as the general way.

A line is plain where its JSON has the plainest shape (sources/plain.py), its record needs nothing
but its texts, and, for a conversation, the template treats all of its shape alike (chats.py). All
other lines are left to the general way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cached_property

from sftprep.chat.template import ChatTemplate
from sftprep.engine.chats import Chats, layouts
from sftprep.engine.recipe import Recipe
from sftprep.engine.texts import Texts, closing
from sftprep.lookup import Letters
from sftprep.reading import Reading
from sftprep.records import keys_of, keys_read
from sftprep.sources.plain import PlainLines


class Columns:
    """A recipe, ready for plain lines."""

    def __init__(
        self, recipe: Recipe, reading: Reading, template: Callable[[], ChatTemplate | None]
    ) -> None:
        """template: gives what renders conversations as they are; None where single messages of
        them count."""
        self._recipe, self._template = recipe, template
        self._prompted = recipe.train_on != "all"
        self._reading = reading
        self._end = closing(recipe.tokenizer)
        self._targets = {target: source for source, target in reading.renames}
        self._looked = (keys_read(reading) or frozenset()) | self._targets.keys()
        sources = [source for source, _ in reading.renames]
        # A chain of renames, or two of one name, is for the general way.
        chained = len(self._targets) < len(sources) or len({*sources, *self._targets}) < 2 * len(
            sources
        )
        self._renamed = frozenset(sources)
        self._idle = chained or reading.function is not None or recipe.expand_turns

    def texts(self, letters: Letters, format_name: str, counts: Counter[str]) -> Texts:
        """The texts of plain lines, layout by layout; none where there is no such line.

        letters: of the lines; counts: what is counted of them.
        """
        made = Texts()
        chats = self._chats if format_name in ("messages", "sharegpt") else None
        if self._idle or (chats is None and format_name not in ("text", "prompt-completion")):
            return made
        if not self._renamed.isdisjoint(keys_of(format_name, self._reading)):
            return made  # what is renamed to something else is no longer there
        try:
            lines = PlainLines(letters)
        except UnicodeDecodeError:
            return made
        if chats is not None:
            key = self._source("conversations" if format_name == "sharegpt" else "messages")
            for layout in layouts(format_name, key):
                turns = lines.turns(layout, self._looked - {key})
                made = made.with_others(chats.texts(turns, layout, letters))
        elif format_name == "text":
            self._plain_texts(lines, made)
        else:
            self._completions(lines, made, counts)
        return made

    @cached_property
    def _chats(self) -> Chats | None:
        template = self._template()
        return None if template is None else Chats(self._recipe, template)

    def _source(self, key: str) -> str:
        """The key under which records hold what `key` names."""
        return self._targets.get(key, key)

    def _plain_texts(self, lines: PlainLines, made: Texts) -> None:
        key = self._source(self._reading.text_field)
        fields = lines.fields([key], self._looked - {key})
        end = self._end
        self._add(
            fields.lines.tolist(),
            [text if text.endswith(end) else text + end for text in fields.values[key]],
            made,
        )

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
