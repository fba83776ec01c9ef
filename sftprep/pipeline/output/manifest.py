"""Fields of a manifest that are known before pass 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sftprep.config.build import BuildConfig
from sftprep.recipe import Recipe

_NOT_STORED = ("output", "workers", "overwrite", "keep_spill", "on_bad_record", "max_rejected")
"""Settings that do not change a byte of the shards: the same build made elsewhere, or in another
way, has the same manifest."""


def manifest_settings(config: BuildConfig, names: Sequence[str]) -> dict[str, Any]:
    """Return the settings that a manifest stores.

    Args:
        config: The settings of the build.
        names: The names of its inputs, stored if the settings name none (data in memory).
    """
    settings = {name: value for name, value in config.flat().items() if name not in _NOT_STORED}
    return {
        **settings,
        "map": list(config.format.map),
        "inputs": list(config.source.inputs) or list(names),
    }


def manifest_facts(recipe: Recipe, encoder: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that depend on the recipe and on its encoder only."""
    spec = recipe.tokenizer
    return {
        "tokenizer": {
            "name": spec.name,
            "fingerprint": spec.fingerprint,
            "vocab_size": spec.vocab_size,
            "eos_token_id": spec.eos_token_id,
            "pad_token_id": spec.pad_token_id,
        },
        "chat_template": recipe.chat_template,
        "encoder": encoder,
    }
