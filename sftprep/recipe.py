"""The recipe: everything that pass 1 depends on, apart from the bytes of a partition.

It is plain data, which workers read from a file.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import orjson

from sftprep.chat_template.reference.rendering import REASONING_KEYS
from sftprep.chat_template.template import ChatTemplate
from sftprep.config.user_functions import load_function, source_digest
from sftprep.config.validation import TemplateBackend, TrainOn, TruncateSide
from sftprep.core.hashing import digest
from sftprep.errors import TemplateError
from sftprep.records.options import RecordOptions
from sftprep.records.roles import PASSED_ROLES
from sftprep.tokenize.equivalence.reference_client import ServerAddress
from sftprep.tokenize.loading.spec import TokenizerSpec

_VERSION = 4
"""Incremented when the same recipe produces other tokens than before, so that older spills are not
reused."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the records of a partition become sequences. Equal recipes produce equal sequences."""

    tokenizer: TokenizerSpec
    chat_template: str | None
    date: str | None  # the date that the template sees as today, YYYY-MM-DD; None: not used
    train_on: TrainOn
    text_field: str
    renames: tuple[tuple[str, str], ...]  # keys of records: (from, to)
    max_length: int  # tokens of a sequence
    encoder: str
    template_backend: TemplateBackend
    overlong: str = "truncate"  # what happens to longer sequences: as in PackConfig, or "keep"
    truncate_side: TruncateSide = "right"
    expand_turns: bool = False
    escape_special: bool = False
    # Whether requests and answers are turns; None: known pairs are, if there is a chat template.
    as_chat: bool | None = None
    drop_images: bool = False
    formatting_func: str | None = None  # the name of the user's function
    # Whether conversations that fail `sftprep.records.quality_checks` are rejected.
    reject_suspects: bool = False

    @property
    def digest(self) -> str:
        """The SHA-256 of the recipe, in hex. It does not depend on the encoder and the backend of
        the template, because all of them give the same ids."""
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

    def record_options(self) -> RecordOptions:
        """Return how records are read under this recipe.

        Raises:
            ConfigError: The formatting function cannot be loaded.
        """
        template = self.chat_template or ""
        return RecordOptions(
            self.renames,
            self.text_field,
            chat=self.chat_template is not None and self.as_chat is not False,
            as_chat=bool(self.as_chat),
            drop_images=self.drop_images,
            tool_calls="tool_calls" in template,
            reasoning=any(key in template for key in REASONING_KEYS),
            shown_roles=_shown_roles(template, tuple(self.tokenizer.special_tokens.items())),
            function=load_function(self.formatting_func) if self.formatting_func else None,
        )

    def template(
        self, *, turns: bool = False, anchors: Callable[[str], int] | None = None
    ) -> ChatTemplate | None:
        """Return the chat template, None if there is none.

        Args:
            turns: As for `ChatTemplate`.
            anchors: As for `ChatTemplate`.

        Raises:
            TemplateError: The source is not a template.
        """
        if self.chat_template is None:
            return None
        day = datetime.date.fromisoformat(self.date) if self.date else None
        return ChatTemplate(
            self.chat_template,
            variables=self.tokenizer.special_tokens,
            date=day,
            backend=self.template_backend,
            turns=turns,
            anchors=anchors,
        )

    def to_bytes(self) -> bytes:
        """Return the content of a recipe file: a line of JSON, followed by the tokenizer's JSON."""
        parts = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "tokenizer"
        }
        return (
            orjson.dumps({**parts, "tokenizer": self.tokenizer.to_fields()})
            + b"\n"
            + self.tokenizer.json
        )


@lru_cache(maxsize=8)
def _shown_roles(template: str, special_tokens: tuple[tuple[str, str], ...]) -> frozenset[str]:
    """Return the roles of tool results that a template shows."""
    try:
        probed = ChatTemplate(template, variables=dict(special_tokens), backend="jinja")
    except TemplateError:
        return PASSED_ROLES  # reported where the template is used
    return probed.shown_roles(PASSED_ROLES)


@dataclass(frozen=True, slots=True)
class RecipeFile:
    """A recipe as workers receive it: the path of a file.

    A recipe has megabytes, so it is not sent to each worker.
    """

    path: Path
    # The recipe itself, only in the process that created it.
    in_memory: Recipe | None = dataclasses.field(default=None, compare=False, repr=False)
    # The server of the reference encoder, if all workers share one.
    reference: ServerAddress | None = dataclasses.field(default=None, compare=False, repr=False)

    def __reduce__(self) -> tuple[type[RecipeFile], tuple[Path, None, ServerAddress | None]]:
        return RecipeFile, (self.path, None, self.reference)

    def recipe(self) -> Recipe:
        """Return the recipe, which is read from the file in any other process."""
        return self.in_memory or _read_recipe(self.path)


def recipe_file(folder: Path, recipe: Recipe, reference: ServerAddress | None = None) -> RecipeFile:
    """Return the file of a recipe, which is not written yet."""
    # The encoder does not affect the digest, but a worker that has loaded this file must use the
    # encoder of the recipe.
    name = digest(recipe.digest, recipe.encoder, recipe.template_backend, recipe.tokenizer.name)
    return RecipeFile(folder / f"recipe-{name[:16]}.jsonl", recipe, reference)


def _read_recipe(path: Path) -> Recipe:
    with open(path, "rb") as file:
        line, tokenizer = file.readline(), file.read()
    parts = orjson.loads(line)
    parts["tokenizer"] = TokenizerSpec.from_fields(parts["tokenizer"], tokenizer)
    parts["renames"] = tuple((source, target) for source, target in parts["renames"])
    return Recipe(**parts)
