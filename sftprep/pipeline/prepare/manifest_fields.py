"""Fields of a manifest: the settings, and how conversations were rendered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sftprep.config.build import BuildConfig
from sftprep.core.hashing import digest
from sftprep.recipe import Recipe

_RENDERING = ("template.", "masks.")
_REASON_PREFIX = "masks.because."
_NOT_STORED = (
    *("output", "workers", "executor", "ray_address", "overwrite", "keep_spill"),
    "scratch",
    *("on_bad_record", "max_rejected", "part"),
)
"""Settings that do not change a byte of the shards: the same build made elsewhere, or in another
way, has the same manifest."""


def manifest_settings(config: BuildConfig, names: Sequence[str]) -> dict[str, Any]:
    """Return the settings for a manifest.

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
    """Return the fields determined by the recipe and its encoder."""
    spec = recipe.tokenizer
    return {
        "tokenizer": {
            "name": spec.name,
            "fingerprint": spec.fingerprint,
            "vocab_size": spec.vocab_size,
            "eos_token_id": spec.eos_token_id,
            "pad_token_id": spec.pad_token_id,
            **({"added": list(spec.added)} if spec.added else {}),
        },
        "chat_template": recipe.chat_template,
        "encoder": encoder,
    }


def count_rendering(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return how often each method of rendering and masking was used, by name.

    Args:
        counts: The counts of each partition.
    """
    total: Counter[str] = Counter()
    for part in counts:
        total.update({name: n for name, n in part.items() if name.startswith(_RENDERING)})
    return dict(total)


def digest_templates(recipe: Recipe) -> dict[str, str]:
    """Return the digests of the chat templates, for the manifest; {} without a template."""
    if recipe.chat_template is None:
        return {}
    tools = {"tool_digest": digest(recipe.tool_template)} if recipe.tool_template else {}
    return {"digest": digest(recipe.chat_template), **tools}


def describe_rendering(digests: Mapping[str, str], total: Mapping[str, int]) -> dict[str, Any]:
    """Return how the conversations were rendered and masked, for the manifest.

    It has the number of conversations for each backend (compiled pieces or Jinja), the number of
    masks for each path (token ids or characters), and the reasons for the slower path.

    Args:
        digests: The result of `digest_templates`.
        total: The sum of the results of `count_rendering`.
    """
    if not digests:
        return {}
    renders = {backend: total.get(f"template.{backend}", 0) for backend in ("pieces", "jinja")}
    backends = [backend for backend, number in renders.items() if number]
    reasons = {
        name.removeprefix(_REASON_PREFIX): number
        for name, number in total.items()
        if name.startswith(_REASON_PREFIX)
    }
    return {
        **digests,
        "way": "mixed" if len(backends) > 1 else "".join(backends) or "none",
        "renders": renders,
        "masks": {
            "by_ids": total.get("masks.by_ids", 0),
            "by_characters": total.get("masks.by_characters", 0),
            "because": dict(sorted(reasons.items())),
        },
    }
