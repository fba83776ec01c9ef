"""The chat templates of a build: those of the tokenizer, or the one in the settings."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from pathlib import Path

from sftprep.config.build import BuildConfig
from sftprep.errors import TemplateError, setting
from sftprep.render.compatibility import check_compiles
from sftprep.tokenize.loading.spec import TokenizerSpec

_FIXED_DATE = "2024-07-26"
"""The date that templates see as today; the fallback of the template of Llama 3."""


def read_templates(config: BuildConfig, spec: TokenizerSpec) -> tuple[str | None, str | None]:
    """Return the chat template, and the one for tools if it is different.

    Of several templates of a tokenizer, `apply_chat_template` uses the one named `tool_use` for
    conversations with tools, and the one named `default` for all others.
    """
    path, named = config.tokenize.chat_template, spec.named_templates
    if path is None:
        default, tool_template = spec.chat_template, named.get("tool_use")
        return default, None if default in (None, tool_template) else tool_template
    if path in named and not Path(path).exists():
        return named[path], None
    return _read_template_file(path, named), None


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
            ],
        ) from error
    except UnicodeDecodeError as error:
        raise TemplateError(
            f"the chat template {path} is not UTF-8 text",
            remedy="specify a file with a Jinja template",
        ) from error
    check_compiles(template)
    return template
