"""The settings of a stream: those of a build, without corpus-wide ones.

Settings that require the whole corpus are left out.
"""

from __future__ import annotations

import dataclasses

from sftprep.config.build import BuildConfig, Order
from sftprep.errors import ConfigError, setting

WINDOW = 4096
"""Sequences in a full window of a lane, unless `pack_window` is set."""

CHECK_SETTINGS = (
    f"check {setting('train_on')} and {setting('max_length')}, the format of the records, and that"
    " the source is the intended one"
)
"""The remedy where records give no sequence that can be trained on."""


def stream_config(
    config: BuildConfig, tokenizer: str | None, window: int | None, order: Order, lanes: int | None
) -> BuildConfig:
    """Return the configuration of a stream.

    Args:
        config: The settings of a build.
        tokenizer: Replaces that of `config`, unless it is None or empty.
        window: Replaces `pack_window`, unless it is None; ignored without packing.
        lanes: Replaces that of `config`, unless it is None.
        order: Replaces that of `config`. Builds are shuffled by default, and streams are not.

    Raises:
        ConfigError: A setting is not supported by streams.
    """
    build_only = {
        "limit": config.read.limit is not None,
        "duplicates": config.read.duplicates != "keep",
        "duplicates_by": bool(config.read.duplicates_by),
        "eval_fraction": bool(config.evaluation.eval_fraction),
        "eval_input": bool(config.evaluation.eval_input),
        "eval_split": config.evaluation.eval_split is not None,
        "layout": config.output.layout != "packs",
    }
    for name, is_set in build_only.items():
        if is_set:
            raise ConfigError(
                f"{setting(name)} is only supported by builds, which know all of their records",
                remedy=f"leave out {setting(name)}, or build shards",
            )
    if config.read.mix_by != "records":
        raise ConfigError(
            f"{setting('mix_by', config.read.mix_by)} counts the weights of sources in a config"
            " file, which are only supported by builds",
            remedy='pass a mixture to the stream: Mixture(sources, weights, mix_by="tokens")',
        )
    if config.pack.packing not in ("bfd", "none"):
        raise ConfigError(
            f"{setting('packing', config.pack.packing)} is not supported by streams",
            remedy=[
                f"use {setting('packing', 'bfd')}",
                f"use {setting('packing', 'none')}",
                "build shards",
            ],
        )
    if config.pack.packing == "none":
        window = None  # each sequence is a pack, in the order of the input
    elif window is None:
        window = config.pack.pack_window or WINDOW
    pack = dataclasses.replace(
        config.pack,
        pack_window=window,
        order=order,
        lanes=config.pack.lanes if lanes is None else lanes,
    )
    tokenize = config.tokenize
    if tokenizer:
        tokenize = dataclasses.replace(tokenize, tokenizer=tokenizer)
    return dataclasses.replace(config, pack=pack, tokenize=tokenize)
