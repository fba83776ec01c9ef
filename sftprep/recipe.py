"""The recipe of the sequences, independent of the bytes of a partition.

It has everything else that the sequences depend on. It is plain data, which workers read from a
file. The lengths to which sequences are cut are not part of it: see
`sftprep.pipeline.passes.overlong`.
"""

from __future__ import annotations

import dataclasses
import datetime
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from json import loads
from pathlib import Path
from typing import Any

import orjson

from sftprep.chat_template.reference.content_forms import needs_json_schemas
from sftprep.chat_template.template import ChatTemplate
from sftprep.config.user_functions import LoadedFunction, function_key
from sftprep.config.validation import Reasoning, TemplateBackend, TrainEnd, TrainOn, TrainRole
from sftprep.core.hashing import digest
from sftprep.errors import TemplateError
from sftprep.records.options import RecordOptions
from sftprep.records.roles import PASSED_ROLES
from sftprep.records.transform import FORMATTED_KEY, RecordFunctions
from sftprep.tokenize.equivalence.reference_client import ServerAddress
from sftprep.tokenize.loading.spec import TokenizerSpec

_VERSION = 8
"""Incremented when the same recipe produces other tokens, masks or weights than before, so that
older spills are not reused."""

_PARAMETERS = re.compile(r"""\.parameters\b|\[['"]parameters['"]\]""")
"""The parameters of a tool in a template that writes them one by one, and not as JSON."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """The rules for the conversion of a partition's records to sequences.

    Equal recipes produce equal sequences.
    """

    tokenizer: TokenizerSpec
    chat_template: str | None
    date: str | None  # the date that the template sees as today, YYYY-MM-DD; None: not used
    train_on: TrainOn
    text_field: str
    renames: tuple[tuple[str, str], ...]  # keys of records: (from, to)
    encoder: str
    template_backend: TemplateBackend
    reasoning: Reasoning = "template"
    train_empty_thinking: bool = True
    escape_special: bool = False
    # Whether requests and answers are turns; None: known pairs are, if there is a chat template.
    as_chat: bool | None = None
    drop_images: bool = False
    # Functions of the user, and the version of them that the user specified.
    formatting_func: LoadedFunction | None = None
    transform: LoadedFunction | None = None
    transform_id: str | None = None
    # Whether conversations that fail `sftprep.records.checks.quality_checks` are rejected.
    reject_suspects: bool = False
    # The kinds of omissions that reject a record. The name of the field is a part of the digest,
    # and thus of the names of spills and of the state of streams, so it stays.
    rejected_losses: tuple[str, ...] = ()
    # The template of conversations with tools, if it is another one.
    tool_template: str | None = None
    # The roles of the turns that are trained; empty: those of the assistant, or as in `train_on`.
    train_roles: tuple[TrainRole, ...] = ()
    train_end: TrainEnd = "turn"
    # The system message of conversations without one, and the template variables of those that do
    # not specify them, as JSON text.
    system: str | None = None
    template_kwargs: str | None = None

    @property
    def expand_turns(self) -> bool:
        """Return whether each assistant turn becomes an example of its own."""
        return self.reasoning == "expand"

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the recipe, in hex.

        It does not depend on the encoder and the backend of the template, because all of them give
        the same ids. Of a function without a stable digest it has the name only: see `cache_key`.
        """
        parts = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("tokenizer", "encoder", "template_backend")
        }
        spec = self.tokenizer
        for name, function in self.functions().items():
            parts[f"{name}_digest"] = function.digest
        return digest(
            _VERSION, spec.fingerprint, spec.special_tokens, spec.prefix_ids, spec.suffix_ids, parts
        )

    def for_tools(self) -> Recipe | None:
        """Return the recipe of conversations with tools; None if it is this one."""
        if self.tool_template is None:
            return None
        return dataclasses.replace(self, chat_template=self.tool_template, tool_template=None)

    @property
    def cache_key(self) -> str:
        """Return the key of everything made with the recipe.

        It is the digest, unless a function has no stable digest and no `transform_id`; then no
        other process has the same key.
        """
        functions = self.functions().values()
        keys = [f.key for f in functions if function_key(f, self.transform_id) is None]
        return digest(self.digest, keys) if keys else self.digest

    def functions(self) -> dict[str, LoadedFunction]:
        """Return the functions of the user, by the name of the setting."""
        settings = {"transform": self.transform, "formatting_func": self.formatting_func}
        return {name: function for name, function in settings.items() if function is not None}

    def record_functions(self, transform: LoadedFunction | None = None) -> RecordFunctions | None:
        """Return the user's functions for the records; None if there are none.

        Args:
            transform: The transform, if it is not that of the recipe.

        Raises:
            SftprepError: A function cannot be loaded in this process.
        """
        transform, formatting = transform or self.transform, self.formatting_func
        if transform is None and formatting is None:
            return None
        return RecordFunctions(
            None if transform is None else transform.load(),
            None if formatting is None else formatting.load(),
            self.renames,
        )

    def record_options(self) -> RecordOptions:
        """Return how records are read under this recipe."""
        template, is_formatted = self.chat_template or "", self.formatting_func is not None
        special_tokens = tuple(self.tokenizer.special_tokens.items())
        has_parameters = _PARAMETERS.search(template) is not None
        return RecordOptions(
            () if is_formatted else self.renames,
            FORMATTED_KEY if is_formatted else self.text_field,
            chat=self.chat_template is not None and self.as_chat is not False,
            as_chat=bool(self.as_chat),
            drop_images=self.drop_images,
            system=self.system,
            template_kwargs=None if self.template_kwargs is None else loads(self.template_kwargs),
            tool_calls="tool_calls" in template,
            tool_parameters=has_parameters,
            tool_schemas=has_parameters and _needs_json_schemas(template, special_tokens),
            shown_roles=_shown_roles(template, special_tokens),
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
        """Return the content of a recipe file.

        It is a line of JSON, followed by the tokenizer's JSON.
        """
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
    """Return the roles of tool results shown by a template."""
    try:
        probed = ChatTemplate(template, variables=dict(special_tokens), backend="jinja")
    except TemplateError:
        return PASSED_ROLES  # reported where the template is used
    return probed.shown_roles(PASSED_ROLES)


@lru_cache(maxsize=8)
def _needs_json_schemas(template: str, special_tokens: tuple[tuple[str, str], ...]) -> bool:
    """Return whether a template shows parameters of tools only in a JSON schema."""
    try:
        probed = ChatTemplate(template, variables=dict(special_tokens), backend="jinja")
    except TemplateError:
        return False  # reported where the template is used
    return needs_json_schemas(lambda messages, tools: probed.render(messages, tools).text)


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
    # Its functions. The file has only their names: code in it would be run by whoever reads it.
    functions: Mapping[str, Any] = dataclasses.field(
        default_factory=dict, compare=False, repr=False
    )

    def __reduce__(self) -> tuple[Any, ...]:
        return RecipeFile, (self.path, None, self.reference, self.functions)

    def recipe(self) -> Recipe:
        """Return the recipe; in any other process, read it from the file."""
        return self.in_memory or dataclasses.replace(_read_recipe(self.path), **self.functions)


def recipe_file(folder: Path, recipe: Recipe, reference: ServerAddress | None = None) -> RecipeFile:
    """Return the file of a recipe without writing it."""
    # The encoder does not affect the digest, but a worker that has loaded this file must use the
    # encoder of the recipe.
    name = digest(recipe.cache_key, recipe.encoder, recipe.template_backend, recipe.tokenizer.name)
    path = folder / f"recipe-{name[:16]}.jsonl"
    return RecipeFile(path, recipe, reference, recipe.functions())


def describe_functions(recipes: Sequence[Recipe]) -> dict[str, Any]:
    """Return the functions of some recipes, each once, for the manifest.

    The result is empty if there are none. `reused` is whether other processes reuse what was made
    with the function.
    """
    used = {
        (name, function, recipe.transform_id): {
            "setting": name,
            "name": str(function),
            "digest": function.digest,
            "transform_id": recipe.transform_id,
            "reused": function_key(function, recipe.transform_id) is not None,
        }
        for recipe in recipes
        for name, function in recipe.functions().items()
    }
    return {"used": [*used.values()]} if used else {}


def _read_recipe(path: Path) -> Recipe:
    with open(path, "rb") as file:
        line, tokenizer = file.readline(), file.read()
    parts = orjson.loads(line)
    parts["tokenizer"] = TokenizerSpec.from_fields(parts["tokenizer"], tokenizer)
    parts["renames"] = tuple((source, target) for source, target in parts["renames"])
    parts["rejected_losses"] = tuple(parts["rejected_losses"])
    return Recipe(**parts)
