"""The chat templates of a build: those of the tokenizer, or the one in the settings."""

from __future__ import annotations

import datetime
import logging
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftprep.chat_template.markers import find_markers
from sftprep.chat_template.shipped import SHIPPED_TEMPLATES, read_shipped
from sftprep.config.build import BuildConfig
from sftprep.errors import TemplateError, setting
from sftprep.render.compatibility import check_compiles
from sftprep.tokenize.loading.extend import add_tokens, special_token
from sftprep.tokenize.loading.load import load_tokenizer
from sftprep.tokenize.loading.spec import TokenizerSpec

_log = logging.getLogger(__name__)

_FIXED_DATE = "2024-07-26"
"""The date that templates see as today; the fallback of the template of Llama 3."""
_FILE_SUFFIXES = (".jinja", ".jinja2", ".j2", ".txt")
"""Suffixes of names that are files, and not names on the Hub."""


@dataclass(frozen=True, slots=True)
class Templates:
    """The chat templates of a build, and the tokenizer with all tokens that they need.

    Attributes:
        default: The template of conversations; None if there is none.
        with_tools: That of conversations with tools, if it is another one.
        tokenizer: The tokenizer.
    """

    default: str | None
    with_tools: str | None
    tokenizer: TokenizerSpec


@dataclass(frozen=True, slots=True)
class ChosenTemplate:
    """A template that replaces that of a tokenizer.

    Attributes:
        source: The source of the template.
        tokens: The tokens that the tokenizer lacks, as in tokenizer.json without their ids.
        eos_token: The token that becomes the EOS token; None if that of the tokenizer stays.
    """

    source: str
    tokens: tuple[dict[str, Any], ...]
    eos_token: str | None


def read_templates(config: BuildConfig, spec: TokenizerSpec) -> Templates:
    """Return the chat templates and the tokenizer of a build.

    Of several templates of a tokenizer, `apply_chat_template` uses the one named `tool_use` for
    conversations with tools, and the one named `default` for all others.

    Raises:
        TemplateError: No template has this name, or it cannot be read.
        TokenizerError: The tokenizer with the template cannot be loaded, or tokens not be added.
    """
    name, named = config.tokenize.chat_template, spec.named_templates
    default, with_tools = spec.chat_template, named.get("tool_use")
    if name is None:
        with_tools = None if default in (None, with_tools) else with_tools
    elif name in named and not Path(name).exists():
        default, with_tools = named[name], None
    else:
        chosen = choose_template(
            name, spec.special_tokens, known=spec.added_tokens(), named=spec.named_templates
        )
        default, with_tools = chosen.source, None
        spec = add_tokens(spec, chosen.tokens)
        if chosen.eos_token is not None and config.tokenize.eos_token is None:
            spec = spec.with_eos(chosen.eos_token)
        if chosen.tokens:
            _log.info(
                "%d tokens of the chat template are added to %s: %s",
                *(len(chosen.tokens), spec.name),
                " ".join(entry["content"] for entry in chosen.tokens),
            )
    if config.tokenize.eos_token is not None:
        spec = spec.with_eos(config.tokenize.eos_token)
    return Templates(default, with_tools, spec)


def choose_template(
    name: str,
    special_tokens: Mapping[str, str],
    *,
    known: Container[str],
    named: Iterable[str] = (),
) -> ChosenTemplate:
    """Return the template of a name, and what a tokenizer lacks for it.

    The name is looked up in this order:

    1. a file. The markers in it (`<|im_end|>`) are tokens. If the one that ends a turn of the
       assistant is new, it becomes the EOS token;
    2. a template of this package, whose markers are tokens too; its end of a turn is the EOS token;
    3. a folder or Hub name of a tokenizer, whose template, added tokens and EOS token are copied,
       as `clone_chat_template` of TRL does.

    Args:
        name: The path or name.
        special_tokens: The special tokens of the tokenizer, by the names that templates use.
        known: The tokens that the tokenizer never encodes as ordinary text.
        named: The names of its own templates, which an error offers.

    Raises:
        TemplateError: No template has this name, or it cannot be read.
        TokenizerError: The tokenizer of this name cannot be loaded.

    Example:
        choose_template("chatml", {}, known=()).eos_token  ->  "<|im_end|>"
    """
    shipped = None if Path(name).is_file() else read_shipped(name)
    if shipped is None and _is_tokenizer(name):
        return _copy_template(name, known)
    source = _read_template_file(name, named) if shipped is None else shipped.source
    markers = find_markers(source, special_tokens)
    tokens = tuple(special_token(token) for token in markers.tokens if token not in known)
    if shipped is not None:
        return ChosenTemplate(source, tokens, shipped.end_token)
    return ChosenTemplate(source, tokens, None if markers.end_token in known else markers.end_token)


def _is_tokenizer(name: str) -> bool:
    """Return whether a name is that of a tokenizer, in a folder or on the Hub."""
    path = Path(name)
    is_hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and path.suffix not in _FILE_SUFFIXES
    return path.is_dir() or (not path.exists() and bool(is_hub_name))


def _copy_template(name: str, known: Container[str]) -> ChosenTemplate:
    other = load_tokenizer(name)
    if other.chat_template is None:
        raise TemplateError(
            f"the tokenizer {name} has no chat template",
            remedy=[
                "use the tokenizer of an instruction-tuned model",
                *(f"use {setting('chat_template', shipped)}" for shipped in SHIPPED_TEMPLATES),
            ],
        )
    entries = other.part("added_tokens") or []
    tokens = tuple(entry for entry in entries if entry["content"] not in known)
    return ChosenTemplate(other.chat_template, tokens, other.eos_token)


def template_date(config: BuildConfig, templates: str) -> str | None:
    """Return the date for templates; None if they do not read the date.

    By default it is a fixed day, so that a rebuild or a resume on a later day gives the same bytes.
    """
    if "strftime_now" not in templates:
        return None
    if config.tokenize.date == "today":
        return datetime.date.today().isoformat()
    return config.tokenize.date or _FIXED_DATE


def template_source(config: BuildConfig, tool_template: str | None) -> str:
    """Return the file of the chat template, or the name of the tokenizer with it."""
    if config.tokenize.chat_template is not None:
        return config.tokenize.chat_template
    file = Path(config.tokenize.tokenizer) / "chat_template.jinja"
    source = str(file) if file.is_file() else config.tokenize.tokenizer
    return source if tool_template is None else f"{source} (with tools: its tool_use)"


def _read_template_file(path: str, named: Iterable[str]) -> str:
    try:
        template = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise TemplateError(
            f"cannot read the chat template {path}: {error.strerror}",
            remedy=[
                f"check the path in {setting('chat_template')}",
                *(f"use {setting('chat_template', name)} of the tokenizer" for name in named),
                *(f"use {setting('chat_template', name)}" for name in SHIPPED_TEMPLATES),
            ],
        ) from error
    except UnicodeDecodeError as error:
        raise TemplateError(
            f"the chat template {path} is not UTF-8 text",
            remedy="specify a file with a Jinja template",
        ) from error
    check_compiles(template)
    return template
