"""Chat templates that come with this package, for tokenizers of base models."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

_END_TOKENS = {"chatml": "<|im_end|>"}
"""The name of each template, and the token that ends a turn."""

SHIPPED_TEMPLATES = tuple(_END_TOKENS)


@dataclass(frozen=True, slots=True)
class ShippedTemplate:
    """A template of this package."""

    source: str
    end_token: str


def read_shipped(name: str) -> ShippedTemplate | None:
    """Return the template of a name; None if there is none."""
    if name not in _END_TOKENS:
        return None
    source = files(__name__).joinpath(f"{name}.jinja").read_text(encoding="utf-8")
    return ShippedTemplate(source, _END_TOKENS[name])
