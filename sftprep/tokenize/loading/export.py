"""Export of a live tokenizer to a file for builds."""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path
from typing import Any

import orjson

from sftprep.config.cache_location import cache_dir
from sftprep.config.validation import check_local_path
from sftprep.errors import StorageError
from sftprep.tokenize.loading.load import SPEC_SUFFIX, read_spec, write_spec
from sftprep.tokenize.loading.resolve import check_json
from sftprep.tokenize.loading.spec import tokenizer_spec


def export_tokenizer(tokenizer: Any, *, cache: Path | None = None) -> Path:
    """Write a tokenizer of transformers to a file named by its content.

    It is written in its present state. All changes in memory are included: added tokens, another
    chat template, another EOS token.

    Args:
        tokenizer: A fast tokenizer of transformers.
        cache: The folder to write to; `cache_dir()` by default.

    Returns:
        The file, which a build accepts as its `tokenizer`.

    Raises:
        TokenizerError: The tokenizer has no fast backend, or does more than that backend.
        StorageError: The file cannot be written.
        ConfigError: The cache is not on a local disk.
    """
    if cache is not None:
        check_local_path(os.fspath(cache), "the cache")
    spec = tokenizer_spec(tokenizer)
    check_json(spec, tokenizer)
    fields = orjson.dumps(spec.to_fields(), option=orjson.OPT_SORT_KEYS)
    name = sha256(fields + spec.json).hexdigest()[:32] + SPEC_SUFFIX
    path = (cache or cache_dir()) / "tokenizers" / "live" / name
    # A file of that name may be damaged, so it is read and not only looked up.
    if read_spec(path) is None and not write_spec(path, spec):
        raise StorageError(
            f"cannot write the tokenizer to {path}",
            remedy="set SFTPREP_CACHE to a folder that is writable",
        )
    return path
