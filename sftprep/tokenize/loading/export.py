"""A live tokenizer, as it is in memory now, written down where builds find it."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import orjson

from sftprep.config.cache_location import cache_dir
from sftprep.errors import StorageError
from sftprep.tokenize.loading.load import SPEC_SUFFIX, read_spec, write_spec
from sftprep.tokenize.loading.resolve import check_json
from sftprep.tokenize.loading.spec import tokenizer_spec


def export_tokenizer(tokenizer: Any, *, cache: Path | None = None) -> Path:
    """Write a tokenizer of transformers down, and return the file that a build takes as its
    `tokenizer`.

    Whatever was changed in memory holds: tokens added, another template, another end token. The
    file is named by its content. Raises TokenizerError where the tokenizer has no fast backend or
    does more than that backend says, StorageError where the cache cannot be written.
    """
    spec = tokenizer_spec(tokenizer)
    check_json(spec, tokenizer)
    name = sha256(
        orjson.dumps(spec.to_fields(), option=orjson.OPT_SORT_KEYS) + spec.json
    ).hexdigest()[:32]
    place = (cache or cache_dir()) / "tokenizers" / "live" / (name + SPEC_SUFFIX)
    if read_spec(place) is None and not write_spec(place, spec):
        raise StorageError(
            f"cannot write the tokenizer to {place}",
            remedy="set SFTPREP_CACHE to a folder that can be written",
        )
    return place
