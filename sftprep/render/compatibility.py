"""Whether the records of an input can be rendered and masked under a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from sftprep.chat_template.assistant_spans import Unproven
from sftprep.chat_template.template import ChatTemplate
from sftprep.errors import ConfigError, TemplateError, TokenizerError, setting, source_name
from sftprep.recipe import Recipe
from sftprep.records.formats import FORMATS
from sftprep.render.renderer import Renderer
from sftprep.tokenize.loading.spec import TokenizerSpec


@dataclass(frozen=True, slots=True)
class DetectedFormat:
    """The format of an input, as its first records show it."""

    file: str
    format: str
    is_chat: bool  # the records are conversations, which need a template
    masks: frozenset[str] = frozenset()  # the keys of pre-tokenized rows that mark trained tokens
    # Whether a record shows it. If none can be read, pass 1 reports why, with lines.
    is_certain: bool = True


@lru_cache(maxsize=16)
def check_compiles(template: str) -> None:
    """Raise TemplateError if a chat template does not compile."""
    # Jinja only: the compiled form is made where the template is used.
    ChatTemplate(template, variables={}, backend="jinja")


def uses_template(recipe: Recipe, detected: DetectedFormat) -> bool:
    """Return whether the chat template renders the records of an input."""
    return recipe.chat_template is not None and (
        detected.is_chat
        or (FORMATS[detected.format].kind == "pair" and recipe.as_chat is not False)
    )


_TRAINED = {
    "all": "every token",
    "completion": "the completion",
    "assistant": "the turns of the assistant",
    "last-assistant": "the last turn of the assistant",
}


def trained_part(recipe: Recipe, detected: DetectedFormat) -> str:
    """Return what is trained, in words."""
    kind = FORMATS[detected.format].kind
    if not detected.is_certain:
        return "nothing: no record could be read to detect the format"
    if kind == "tokens":
        return "what the labels or masks of the rows mark" if detected.masks else _TRAINED["all"]
    if recipe.train_on == "auto":
        has_completion = kind in ("prompt", "pair") or recipe.expand_turns
        return _TRAINED["completion" if has_completion else "all"]
    if recipe.train_roles:
        return f"the turns of {' and '.join(recipe.train_roles)}"
    if kind in ("prompt", "pair") and not uses_template(recipe, detected):
        # Strings have no turns.
        return _TRAINED["all" if recipe.train_on == "all" else "completion"]
    return _TRAINED[recipe.train_on]


def check_compatible(recipe: Recipe, detected: DetectedFormat) -> None:
    """Raise an error for the first setting not supported by the records of a file."""
    holds = f"{source_name(detected.file)} holds {detected.format} records"
    tokenizer = recipe.tokenizer.name
    # 1. Conversations need a template that compiles, plain text needs a token that ends it.
    if detected.is_chat and recipe.chat_template is None:
        raise _missing_template(holds, recipe.tokenizer)
    kind, is_rendered = FORMATS[detected.format].kind, uses_template(recipe, detected)
    if is_rendered:
        check_compiles(recipe.chat_template or "")
    needs_eos = detected.format != "tokens" and not is_rendered
    if needs_eos and recipe.tokenizer.eos_token is None:
        raise TokenizerError(
            f"{holds}, which are plain text, and the tokenizer {tokenizer} has no end-of-sequence"
            " token",
            remedy=f"specify one of its tokens with {setting('eos_token')}",
        )
    # 2. The records must contain the part to train.
    if not detected.is_certain:
        return
    has_completion = kind not in ("conversation", "text") or (
        detected.is_chat and recipe.expand_turns
    )
    if recipe.train_on == "completion" and not has_completion:
        raise ConfigError(
            f"{setting('train_on', 'completion')}: {holds}, which have no completion",
            remedy=[
                f"use {setting('train_on', 'all')}",
                f"use {setting('train_on', 'assistant')}",
                f"rename keys to prompt and completion with {setting('map')}",
            ],
        )
    by_turn = recipe.train_on in ("assistant", "last-assistant")
    if (by_turn or recipe.expand_turns) and detected.format == "text":
        cause = setting("train_on", recipe.train_on) if by_turn else setting("reasoning", "expand")
        raise ConfigError(
            f"{cause}: {holds}, which have no turns", remedy=f"use {setting('train_on', 'all')}"
        )
    for name, is_set in (
        ("train_roles", bool(recipe.train_roles)),
        ("train_end", recipe.train_end != "turn"),
        ("system", recipe.system is not None),
        ("chat_template_kwargs", recipe.template_kwargs is not None),
    ):
        if is_set and not is_rendered:
            raise ConfigError(
                f"{setting(name)}: {holds}, which are not rendered as turns",
                remedy=f"leave out {setting(name)} for them",
            )
    # 3. It must be possible to find that part.
    if detected.format == "tokens":
        _check_pretokenized(recipe, detected)
    if by_turn and is_rendered:
        _check_masks(recipe)


def _missing_template(holds: str, tokenizer: TokenizerSpec) -> TemplateError:
    """Return the error for conversations and a tokenizer without a template for them."""
    problem = f"{holds}, which are conversations, and the tokenizer {tokenizer.name} has"
    names = [*tokenizer.named_templates]
    if names:
        return TemplateError(
            f"{problem} the chat templates {', '.join(names)}, but none named default",
            remedy=[f"choose one with {setting('chat_template', name)}" for name in names],
        )
    return TemplateError(
        f"{problem} no chat template",
        remedy=[
            f"specify one with {setting('chat_template', 'FILE')}",
            f"use {setting('chat_template', 'chatml')}, whose tokens are added to the tokenizer",
            "use the tokenizer of an instruction-tuned model",
        ],
    )


_MASK_KEYS = {
    "completion": frozenset({"labels", "completion_mask"}),
    "assistant": frozenset({"labels", "assistant_masks"}),
}
"""For values of `train_on`, the keys of a pre-tokenized row that mark the trained tokens."""


def _check_pretokenized(recipe: Recipe, detected: DetectedFormat) -> None:
    """Raise ConfigError if pre-tokenized rows do not mark the tokens to train."""
    has_masks = recipe.train_on in ("auto", "all") or detected.masks & _MASK_KEYS.get(
        recipe.train_on, frozenset()
    )
    if has_masks and not recipe.expand_turns:
        return
    name, value = "train_on", str(recipe.train_on)
    if recipe.expand_turns:
        name, value = "reasoning", "expand"
    raise ConfigError(
        f"{setting(name, value)}: {source_name(detected.file)} holds tokens, which do not mark"
        " that part",
        remedy=(
            f"omit {setting(name)}; the trained tokens of pre-tokenized rows are those that their"
            ' "labels", "completion_mask" or "assistant_masks" mark'
        ),
    )


def _check_masks(recipe: Recipe) -> None:
    """Raise TemplateError if the template does not show the text of the assistant."""
    try:
        Renderer(recipe).check_masks()
    except Unproven as error:
        raise TemplateError(
            f"{setting('train_on', recipe.train_on)}: the chat template does not mark the text of"
            f" the assistant with {{% generation %}}, and {error.message}",
            remedy=[
                f"specify a template with these marks with {setting('chat_template', 'FILE')} (the"
                " training templates of models have them)",
                "use prompt-completion records, whose completions are trained without marks",
                f"use {setting('reasoning', 'expand')}, which makes such records",
            ],
        ) from error
