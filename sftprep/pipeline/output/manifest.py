"""Fields of a manifest that are known before the build, and a check of its expected size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sftprep.config.build import BuildConfig, SourceEntry
from sftprep.pipeline.inputs import Input
from sftprep.recipe import Recipe
from sftprep.shards.manifest_size import check_manifest_size, expected_input

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


def check_expected_size(
    config: BuildConfig, inputs: list[Input], entries: list[SourceEntry], facts: dict[str, Any]
) -> None:
    """Check that the manifests of the build and of its evaluation will not be too large.

    Args:
        config: The settings of the build.
        inputs: All of its inputs.
        entries: The sources to which they belong.
        facts: The fields of the manifest that are known, apart from its settings and inputs.

    Raises:
        ConfigError: A manifest would be larger than the largest one that can be read.
    """
    # Each reason for which the accounting of an input may get an entry.
    reasons: list[str] = []
    if config.evaluation.eval_fraction:
        reasons += ["left_out.in_training", "tokens_left_out.in_training"]
    if any(entry.weight is not None for entry in entries):
        reasons += ["left_out.not_sampled", "tokens_left_out.not_sampled"]
    if any(entry.repeat != 1 for entry in entries):
        reasons += ["extra.repeated", "tokens_extra.repeated"]
    for evaluation in (False, True):
        # Inputs of the same source and limit have entries of the same size, apart from the path.
        names_of: dict[tuple[str, int | None], list[str]] = {}
        for each in inputs:
            if each.evaluation == evaluation:
                kind = (entries[each.entry].name, each.source.limit)
                names_of.setdefault(kind, []).append(each.source.name)
        all_names = [name for names in names_of.values() for name in names]
        check_manifest_size(
            {"config": manifest_settings(config, all_names), **facts},
            [(expected_input(*kind, reasons), names) for kind, names in names_of.items()],
        )
