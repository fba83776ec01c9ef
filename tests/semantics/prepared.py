"""The result of pass 1 for some records, without the other passes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from sftprep.config import BuildConfig
from sftprep.core.types import TokenBatch
from sftprep.pipeline.passes.preprocess import Preprocessor, preprocess
from sftprep.pipeline.prepare.setup import length_limit, prepare_recipe
from sftprep.records.formats import detect_format
from sftprep.records.transform import transformed_records


@dataclass
class Prepared:
    """A batch, with the tokenizer that decodes it."""

    batch: TokenBatch
    tokenizer: Tokenizer

    def __len__(self) -> int:
        return len(self.batch.lengths)

    def slice(self, number: int) -> slice:
        return slice(int(self.batch.offsets[number]), int(self.batch.offsets[number + 1]))

    def text(self, number: int = 0) -> str:
        return str(
            self.tokenizer.decode(
                self.batch.input_ids[self.slice(number)].tolist(), skip_special_tokens=False
            )
        )

    def trained(self, number: int = 0) -> list[str]:
        """Return the runs of trained tokens of a sequence, as text."""
        ids, mask = (
            self.batch.input_ids[self.slice(number)].tolist(),
            self.batch.completion_mask[self.slice(number)].tolist(),
        )
        runs: list[list[int]] = []
        before = False
        for token, now in zip(ids, mask, strict=True):
            if now and not before:
                runs.append([])
            if now:
                runs[-1].append(token)
            before = now
        return [str(self.tokenizer.decode(run, skip_special_tokens=False)) for run in runs]

    def weights(self, number: int = 0) -> list[float]:
        assert self.batch.loss_weights is not None
        found: list[float] = self.batch.loss_weights[self.slice(number)].tolist()
        return found


def prepare(rows: list[Any], folder: Path, *, format: str = "auto", **settings: Any) -> Prepared:
    """Run pass 1 on some records. settings: those of BuildConfig."""
    config = BuildConfig.of(
        inputs="-", tokenizer=str(folder), output="-", format=format, **settings
    )
    recipe, _ = prepare_recipe(config)
    limit = length_limit(config, recipe.tokenizer)
    stages = Preprocessor(recipe, threads=False)
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    name = "messages" if format == "auto" else format
    if format == "auto" and not isinstance(rows[0], str):
        first, functions = [dict(rows[0])], stages.functions_with(None)
        made = first if functions is None else transformed_records(first, functions)
        detected = detect_format(next(iter(made)), stages.reading)
        assert detected is not None
        name = detected
    data = "".join(line + "\n" for line in lines).encode()
    return Prepared(
        preprocess(stages, data, name, limit, seed=0), _load_decoder(recipe.tokenizer.json)
    )


@lru_cache(maxsize=8)
def _load_decoder(tokenizer_json: bytes) -> Tokenizer:
    """Load the tokenizer that decodes batches, once per content: a real one takes 0.2 s."""
    return Tokenizer.from_buffer(tokenizer_json)
