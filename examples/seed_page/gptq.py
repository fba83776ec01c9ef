"""Convert a trained adapter to a model in GPTQ format, calibrated on the sequences of a build.

1. Merge the adapter into its base model.
2. Choose the sequences of the build with the most trained tokens.
3. Quantize with auto-round, so that the outputs of each block on these sequences change least.
4. Load the result with transformers, and compare its loss with that of the merged model.

python examples/seed_page/lora.py     # trains the adapter of the defaults
python examples/seed_page/gptq.py     # needs auto-round, and says so where it is missing
"""

from __future__ import annotations

import argparse
import heapq
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import AutoPeftModelForCausalLM
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoRoundConfig, AutoTokenizer

import sftprep

MOST_PACKS = 2000
"""The packs to choose from. The packs of a build are in random order, so they are a sample."""

Sequence = tuple[np.ndarray, np.ndarray]
"""Token ids [n], and which of them are trained [n]."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapter", default="demo/Qwen2.5-0.5B-SFT", help="folder of the adapter")
    parser.add_argument(
        "--shards", default="demo/gptq-shards", help="build; made of chats.jsonl where it is absent"
    )
    parser.add_argument("--output", default="demo/Qwen2.5-0.5B-GPTQ", help="folder of the result")
    parser.add_argument("--bits", type=int, default=4, help="bits of a weight: 2, 3, 4 or 8")
    parser.add_argument(
        "--group-size", type=int, default=32, help="weights with a scale in common; often 128"
    )
    parser.add_argument("--samples", type=int, default=128, help="sequences for the calibration")
    parser.add_argument("--length", type=int, default=512, help="tokens of each of them")
    parser.add_argument(
        "--iters", type=int, default=50, help="steps per block; 0: round to nearest; often 200"
    )
    settings = parser.parse_args(arguments)
    if find_spec("auto_round") is None:
        print('auto-round is not installed: pip install "auto-round>=0.16"')
        sys.exit(0)
    torch.manual_seed(0)
    model = merge(settings.adapter)
    tokenizer = AutoTokenizer.from_pretrained(settings.adapter)
    shards = open_build(settings.shards, settings.adapter)
    calibration, held_out = choose_sequences(shards, settings.samples, settings.length)
    before = mean_loss(model, held_out)  # now, because auto-round replaces the layers of the model
    folder = quantize(model, tokenizer, calibration, settings)
    after = mean_loss(load_quantized(folder), held_out)
    trained = sum(int(mask.sum()) for _, mask in calibration)
    print(f"calibrated on {len(calibration)} sequences with {trained:,} trained tokens")
    print(f"loss of {len(held_out)} other sequences: {before:.4f} -> {after:.4f}, in {folder}")


def merge(adapter: str) -> Any:
    """Return the base model of an adapter, with the adapter merged into its weights."""
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)
    merged = model.merge_and_unload().eval()
    merged.name_or_path = adapter  # auto-round names the folder of the result after it
    return merged


def open_build(folder: str, tokenizer: str) -> sftprep.Shards:
    """Open a build; make one of the example chats where it is absent."""
    if not Path(folder).exists():
        sftprep.build(
            "examples/data/chats.jsonl",
            tokenizer=tokenizer,
            output=folder,
            train_on="assistant",
            eval_fraction=0.1,
            max_length=512,
        )
    return sftprep.open_shards(folder)


def choose_sequences(
    shards: sftprep.Shards, samples: int, length: int
) -> tuple[list[Sequence], list[Sequence]]:
    """Return sequences for the calibration, and others to measure the loss on.

    The weights are rounded so that the outputs on these sequences stay as they are, so those come
    first that have the most tokens that the model was trained to write.

    Args:
        shards: The build. Its evaluation build, if there is one, has the other sequences.
        samples: The maximum number of sequences of each.
        length: The number of tokens after which a sequence is cut.
    """
    ranked = heapq.nlargest(
        2 * samples, sequences(shards, length), key=lambda sequence: int(sequence[1].sum())
    )
    if shards.manifest.eval:
        held_out = list(
            islice(sequences(sftprep.open_shards(shards.root / "eval"), length), samples)
        )
        return ranked[:samples], held_out
    return ranked[0::2], ranked[1::2]


def sequences(shards: sftprep.Shards, length: int) -> Iterator[Sequence]:
    """Yield the sequences of the first packs, cut to a length."""
    for pack in islice(shards, MOST_PACKS):
        ends = np.cumsum(pack.seq_lengths)
        for begin, end in zip(ends - pack.seq_lengths, ends, strict=True):
            stop = min(end, begin + length)
            mask = pack.completion_mask[begin:stop].copy()
            mask[0] = False  # nothing predicts the first token
            if mask.any():
                yield pack.input_ids[begin:stop], mask


def quantize(model: Any, tokenizer: Any, calibration: list[Sequence], settings: Any) -> str:
    """Quantize a model, save it in GPTQ format, and return the folder."""
    from auto_round import AutoRound, SignRoundConfig

    # All samples must have one length. Padding is at the end, and counts for nothing.
    longest = max(len(ids) for ids, _ in calibration)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    batches = []
    for ids, _ in calibration:
        row = torch.full((1, longest), int(pad))
        row[0, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
        attention = (torch.arange(longest) < len(ids)).long()[None]
        batches.append({"input_ids": row, "attention_mask": attention})
    recipe = SignRoundConfig(
        bits=settings.bits, group_size=settings.group_size, sym=True, iters=settings.iters
    )
    rounding = AutoRound(
        model,
        tokenizer,
        alg_configs=recipe,
        dataset=batches,
        seqlen=longest,
        nsamples=len(batches),
        batch_size=min(8, len(batches)),
        device_map="cuda" if torch.cuda.is_available() else "cpu",
        enable_torch_compile=torch.cuda.is_available(),
    )
    _, folder = rounding.quantize_and_save(settings.output, format="auto_gptq")
    tokenizer.save_pretrained(folder)
    return str(folder)


def load_quantized(folder: str) -> Any:
    """Load the result with the kernels of auto-round, which compute in float16, on CPUs too."""
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=AutoRoundConfig()
    ).eval()


@torch.no_grad()
def mean_loss(model: Any, chosen: list[Sequence]) -> float:
    """Return the mean loss of the trained tokens, as in training."""
    total, count = 0.0, 0
    for ids, mask in chosen:
        tokens = torch.from_numpy(ids.astype(np.int64)).to(model.device)
        positions = torch.from_numpy(np.flatnonzero(mask)).to(model.device)
        logits = model(tokens[None], use_cache=False).logits[0, positions - 1].float()
        total += functional.cross_entropy(logits, tokens[positions], reduction="sum").item()
        count += len(positions)
    return total / count


if __name__ == "__main__":
    main()
