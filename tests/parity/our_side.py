"""What pass 1 makes of the same rows, with encoders that are loaded once."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from sftprep.config import BuildConfig
from sftprep.pipeline.passes.preprocess import Preprocessor, preprocess
from sftprep.pipeline.prepare.setup import length_limit, prepare_recipe
from sftprep.records.formats import detect_format
from sftprep.tokenize.encoders.base import Encoder
from sftprep.tokenize.encoders.load import load_encoder
from sftprep.tokenize.loading.load import load_tokenizer
from tests.parity.trl_side import Sequence


@cache
def encoder_of(folder: str, name: str) -> Encoder:
    """An encoder; loading takes half a second for a large tokenizer."""
    return load_encoder(load_tokenizer(folder), name, threads=False)


def our_sequences(
    rows: list[dict[str, Any]],
    folder: Path,
    *,
    format: str = "auto",
    rejected: int = 0,
    **settings: Any,
) -> list[Sequence]:
    """Ids and trained positions of each sequence. settings: as on the command line; rejected: how
    many rows are no use."""
    config = BuildConfig.of(
        inputs="-", tokenizer=str(folder), output="-", format=format, **settings
    )
    recipe, _ = prepare_recipe(config)
    limit = length_limit(config, recipe.tokenizer)
    stages = Preprocessor(recipe, threads=False)
    stages.encoder.__dict__["fast"] = encoder_of(
        str(folder), recipe.encoder
    )  # in place of one that it would load itself
    if recipe.formatting_func is not None:
        format = "text"
    name = detect_format(dict(rows[0]), stages.reading) if format == "auto" else format
    assert name is not None
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    batch = preprocess(stages, lines.encode(), name, limit, seed=0)
    assert len(batch.rejected) == rejected, batch.rejected[:1]
    return [
        (tuple(batch.input_ids[a:b].tolist()), tuple(batch.completion_mask[a:b].tolist()))
        for a, b in zip(batch.offsets[:-1].tolist(), batch.offsets[1:].tolist(), strict=True)
    ]
