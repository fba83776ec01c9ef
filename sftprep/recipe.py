"""What pass 1 depends on beside the bytes of a partition, as plain data that travels to workers as
a file."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import orjson

from sftprep.chat_template.reference.sandbox import REASONING_KEYS
from sftprep.chat_template.template import ChatTemplate
from sftprep.config.user_functions import load_function, source_digest
from sftprep.config.validation import TemplateBackend, TrainOn, TruncateSide
from sftprep.core.hashing import digest
from sftprep.records.options import RecordOptions
from sftprep.tokenize.equivalence.reference_client import ServerAddress
from sftprep.tokenize.loading.spec import TokenizerSpec

_VERSION = 4
"""Raised when the same recipe would give other tokens than before, so that older spills are not
taken for its own."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the records of a partition become sequences. Two equal recipes give equal sequences.

    date: what templates see as today, YYYY-MM-DD, None where they do not look; max_length: tokens
    that a sequence may have; overlong: what happens to a longer one, as in PackConfig, or "keep";
    formatting_func: name of the user's function; reject_suspects: conversations that look wrong are
    set aside (`sftprep.records.quality_checks`).
    """

    tokenizer: TokenizerSpec
    chat_template: str | None
    date: str | None
    train_on: TrainOn
    text_field: str
    renames: tuple[tuple[str, str], ...]
    max_length: int
    encoder: str
    template_backend: TemplateBackend
    overlong: str = "truncate"
    truncate_side: TruncateSide = "right"
    expand_turns: bool = False
    escape_special: bool = False
    formatting_func: str | None = None
    reject_suspects: bool = False

    @property
    def digest(self) -> str:
        """Names the recipe: SHA-256, in hex. Which encoder runs does not count, for all give the
        same ids."""
        parts = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("tokenizer", "encoder", "template_backend")
        }
        spec = self.tokenizer
        if self.formatting_func is not None:
            parts["formatting_source"] = source_digest(self.formatting_func)
        return digest(
            _VERSION, spec.fingerprint, spec.special_tokens, spec.prefix_ids, spec.suffix_ids, parts
        )

    def reading(self) -> RecordOptions:
        """How records are read under this recipe. Raises ConfigError where the formatting function
        is not there."""
        template = self.chat_template or ""
        return RecordOptions(
            self.renames,
            self.text_field,
            chat=self.chat_template is not None,
            tool_calls="tool_calls" in template,
            reasoning=any(key in template for key in REASONING_KEYS),
            function=load_function(self.formatting_func) if self.formatting_func else None,
        )

    def template(
        self, *, turns: bool = False, anchors: Callable[[str], int] | None = None
    ) -> ChatTemplate | None:
        """The chat template, compiled; turns: its renders tell which message wrote what; anchors:
        as for `ChatTemplate`. Raises TemplateError."""
        if self.chat_template is None:
            return None
        day = datetime.date.fromisoformat(self.date) if self.date else None
        return ChatTemplate(
            self.chat_template,
            variables=self.tokenizer.special_tokens,
            date=day,
            way=self.template_backend,
            turns=turns,
            anchors=anchors,
        )

    def to_bytes(self) -> bytes:
        """The recipe for a file: a line of JSON, and then the tokenizer's own."""
        parts = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "tokenizer"
        }
        return (
            orjson.dumps({**parts, "tokenizer": self.tokenizer.facts()})
            + b"\n"
            + self.tokenizer.json
        )


@dataclass(frozen=True, slots=True)
class RecipeFile:
    """A recipe as workers get it: the name of a file, and in the process that made it the recipe
    itself (megabytes).

    reference: the child that has its reference encoder, where all of them ask the same.
    """

    path: Path
    own: Recipe | None = dataclasses.field(default=None, compare=False, repr=False)
    reference: ServerAddress | None = dataclasses.field(default=None, compare=False, repr=False)

    def __reduce__(self) -> tuple[type[RecipeFile], tuple[Path, None, ServerAddress | None]]:
        return RecipeFile, (self.path, None, self.reference)

    def recipe(self) -> Recipe:
        """The recipe, read where this process did not make it."""
        return self.own or _read(self.path)


def recipe_file(folder: Path, recipe: Recipe, reference: ServerAddress | None = None) -> RecipeFile:
    """The file of a recipe, which is not written yet."""
    # The encoder changes no token, and so not the digest; but who has this recipe prepared has it
    # with its encoder.
    name = digest(recipe.digest, recipe.encoder, recipe.template_backend, recipe.tokenizer.name)
    return RecipeFile(folder / f"recipe-{name[:16]}.jsonl", recipe, reference)


def _read(path: Path) -> Recipe:
    with open(path, "rb") as file:
        line, tokenizer = file.readline(), file.read()
    parts = orjson.loads(line)
    parts["tokenizer"] = TokenizerSpec.from_facts(parts["tokenizer"], tokenizer)
    parts["renames"] = tuple((source, target) for source, target in parts["renames"])
    return Recipe(**parts)
