"""The environment of a build: versions, the encoder of a tokenizer, caches, cores and memory.

Nothing here imports torch; `sfttrain env` adds what concerns training.
"""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftprep.config.cache_location import cache_dir, cache_limit
from sftprep.core.versions import version_of
from sftprep.errors import format_count
from sftprep.pipeline.executors.local import available_cores
from sftprep.pipeline.groups.receipt_cache import RECEIPTS_BYTES, RECEIPTS_FOLDER
from sftprep.stores.cache import COPIES_FOLDER
from sftprep.tokenize.loading.load import load_tokenizer
from sftprep.tokenize.select import probe_encoder

_PACKAGES = (
    "sftprep",
    "numpy",
    "numba",
    "pyarrow",
    "orjson",
    "jinja2",
    "tokenizers",
    "gigatoken",
    "huggingface-hub",
    "datasets",
    "ray",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "flash-attn",
    "liger-kernel",
    "bitsandbytes",
)
"""The packages whose versions matter, those of training last."""
_MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True, slots=True)
class CacheUse:
    """The use of a folder of the cache.

    Attributes:
        name: The name of the folder.
        files: The number of its files.
        bytes: Their size.
        limit: The most bytes that it takes; None without a limit.
    """

    name: str
    files: int
    bytes: int
    limit: int | None


@dataclass(frozen=True, slots=True)
class Environment:
    """What a build depends on, apart from its settings and its records.

    Attributes:
        python: The version of Python.
        platform: The operating system and the processor.
        packages: The version of each package that matters; "" if it is not installed.
        cores: The cores that this process may use.
        memory: The bytes of memory that this process may use; None if it is not known.
        cache: The folder of the cache.
        caches: The use of its folders.
        hub_cache: The folder of what was downloaded from the Hub, which has no limit.
        tokenizer: The tokenizer that was asked for; "" if none was.
        encoder: The encoder for it, and how it was checked, as in a manifest; empty without one.
    """

    python: str
    platform: str
    packages: dict[str, str]
    cores: int
    memory: int | None
    cache: str
    caches: tuple[CacheUse, ...]
    hub_cache: str
    tokenizer: str = ""
    encoder: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return dataclasses.asdict(self)

    def to_lines(self) -> list[str]:
        """Return the fields as lines of text."""
        memory = "unknown" if self.memory is None else _format_bytes(self.memory)
        installed = {name: version for name, version in self.packages.items() if version}
        missing = [name for name, version in self.packages.items() if not version]
        return [
            f"python           {self.python} ({self.platform})",
            f"cores            {self.cores}",
            f"memory           {memory}",
            *(f"{name:<16} {version}" for name, version in installed.items()),
            f"not installed    {', '.join(missing) or '-'}",
            *self._encoder_lines(),
            f"cache            {self.cache}",
            *(f"  {each.name:<14} {_describe_use(each)}" for each in self.caches),
            f"hub cache        {self.hub_cache}",
        ]

    def _encoder_lines(self) -> Iterator[str]:
        if not self.encoder:
            yield "encoder          name a tokenizer to see which one it gets: --tokenizer NAME"
            return
        encoder = self.encoder
        yield f"tokenizer        {self.tokenizer}"
        yield f"encoder          {encoder['encoder']} {encoder['encoder_version']}"
        if encoder["equal"]:
            checked = f"equal to tokenizers on {encoder['checked']:,} texts"
        else:
            checked = f"a faster one cannot be used: {encoder['reason']}"
        yield f"                 {checked}"


def describe_environment(tokenizer: str | None = None) -> Environment:
    """Return the environment of builds on this machine.

    Args:
        tokenizer: A tokenizer, to see its encoder.

    Raises:
        TokenizerError: The tokenizer cannot be loaded.
        ConfigError: A variable of the environment is invalid.

    Example:
        describe_environment("Qwen/Qwen3-8B").encoder["encoder"]  ->  "gigatoken"
    """
    from huggingface_hub import constants

    encoder: dict[str, Any] = {}
    if tokenizer:
        _, encoder = probe_encoder(load_tokenizer(tokenizer), "auto")
    return Environment(
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.release()}, {platform.machine()}",
        packages={name: version_of(name) for name in _PACKAGES},
        cores=available_cores(),
        memory=_find_memory(),
        cache=str(cache_dir()),
        caches=tuple(_measure_caches()),
        hub_cache=constants.HF_HUB_CACHE,
        tokenizer=tokenizer or "",
        encoder=encoder,
    )


def _find_memory() -> int | None:
    """Return the memory of the machine, or of the container if it has less."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on every system
        return None
    try:
        limit = _MEMORY_LIMIT.read_text().strip()
    except OSError:
        return memory
    return min(memory, int(limit)) if limit.isdecimal() else memory


def _measure_caches() -> Iterator[CacheUse]:
    limits = {COPIES_FOLDER: cache_limit(), RECEIPTS_FOLDER: RECEIPTS_BYTES}
    try:
        folders = sorted(entry.path for entry in os.scandir(cache_dir()) if entry.is_dir())
    except OSError:
        return  # the folder does not exist yet
    for folder in folders:
        sizes = [
            size
            for parent, _, names in os.walk(folder)
            for name in names
            if (size := _size_of(os.path.join(parent, name))) is not None
        ]
        name = os.path.basename(folder)
        yield CacheUse(name, len(sizes), sum(sizes), limits.get(name))


def _size_of(path: str) -> int | None:
    try:
        return os.lstat(path).st_size
    except OSError:
        return None  # removed by another process


def _describe_use(use: CacheUse) -> str:
    limit = "no limit" if use.limit is None else f"limit {_format_bytes(use.limit)}"
    return f"{_format_bytes(use.bytes)} in {format_count(use.files, 'file')}, {limit}"


def _format_bytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
