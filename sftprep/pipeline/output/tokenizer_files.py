"""The tokenizer in a build to which tokens were added: files that `AutoTokenizer` loads.

A build with the tokenizer of a model does not store it.
"""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from sftprep.core.atomic_write import create_folder, write_bytes
from sftprep.recipe import Recipe
from sftprep.shards.layout import TOKENIZER_FILES, tokenizer_folder
from sftprep.tokenize.loading.spec import TokenizerSpec

_NO_LIMIT = 10**30
"""What transformers uses for a tokenizer without a limit."""


def stage_tokenizer(recipe: Recipe, staging: Path) -> dict[str, Any]:
    """Write the tokenizer to the folder of files before the commit, if tokens were added to it.

    Args:
        recipe: The recipe, with the tokenizer and the template.
        staging: The folder.

    Returns:
        The fields for the manifest: the SHA-256 of the files by name, or nothing.

    Raises:
        StorageError: A file cannot be written.
    """
    if not recipe.tokenizer.added:
        return {}
    config = _tokenizer_config(recipe.tokenizer, recipe.chat_template)
    text = json.dumps(config, indent=1, ensure_ascii=False, sort_keys=True)
    contents = (recipe.tokenizer.json, text.encode())
    digests = [sha256(content).hexdigest() for content in contents]
    folder = staging / tokenizer_folder(digests)
    create_folder(folder)
    for name, content in zip(TOKENIZER_FILES, contents, strict=True):
        write_bytes(folder / name, content)
    return {"files": dict(zip(TOKENIZER_FILES, digests, strict=True))}


def _tokenizer_config(spec: TokenizerSpec, template: str | None) -> dict[str, Any]:
    """Return the content of tokenizer_config.json, for any version of transformers."""
    roles = {*spec.special_tokens.values()}
    special = [entry["content"] for entry in spec.added if entry["special"]]
    return {
        **spec.special_tokens,
        "additional_special_tokens": [token for token in special if token not in roles],
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "model_max_length": spec.model_max_length or _NO_LIMIT,
        "split_special_tokens": spec.split_special_tokens,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
