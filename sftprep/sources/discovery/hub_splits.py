"""Which files of a data set's repository belong to which split, by the rules of `datasets`, from
names and the README alone."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from sftprep.errors import ConfigError
from sftprep.sources.discovery.file_types import kind_of

_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"(?P<split>[\w.]+)-\d{5}-of-\d{5}\b", re.ASCII)


@dataclass(frozen=True, slots=True)
class HubConfig:
    """A configuration of a data set. splits: patterns of the files of each split, or None where
    names tell; within: a folder."""

    name: str
    splits: dict[str, list[str]] | None
    within: str = ""


def choose_config(readme: str, files: list[str], name: str | None, where: str) -> HubConfig:
    """The configuration asked for, else the default one. Raises ConfigError where there is none, or
    one is to be chosen."""
    configs = _written(readme)
    if configs:
        return _one_of(configs, name, where)
    # Without a README's word, as in the Parquet files that the Hub makes: a folder is a
    # configuration.
    folders = sorted({file.split("/")[0] for file in files if file.count("/") == 2})
    if folders and all(file.count("/") == 2 for file in files):
        splits = {folder: _folders(files, folder) for folder in folders}
        return _one_of(
            {folder: HubConfig(folder, splits[folder]) for folder in folders}, name, where
        )
    if name in (None, "default"):
        return HubConfig("default", None)
    inside = [file for file in files if file.startswith(f"{name}/")]
    if not inside:
        raise ConfigError(
            f"{where} has no configuration {name!r}",
            remedy="leave out --config-name, or look at its page on the Hub",
        )
    return HubConfig(str(name), None, f"{name}/")


def files_of_splits(
    config: HubConfig, files: list[str], *, one_kind: bool = True
) -> dict[str, list[str]]:
    """The files of each split of a configuration; a split without files is left out.

    one_kind: where names tell the split, only files of the most common kind are read, as `datasets`
    does: repositories on the Hub hold copies of the same data in other kinds.
    """
    if config.splits is not None:
        found = {
            split: [f for f in files if any(glob_matches(p, f) for p in ps)]
            for split, ps in config.splits.items()
        }
        return {split: own for split, own in found.items() if own}
    inside = [file for file in files if file.startswith(config.within)]
    if one_kind and inside:
        kinds = Counter(kind_of(file) for file in inside)
        most_common = max(kinds, key=lambda kind: (kinds[kind], str(kind)))
        inside = [file for file in inside if kind_of(file) == most_common]
    splits: dict[str, list[str]] = {}
    for file in inside:
        split = _split_of(file.removeprefix(config.within))
        if split is not None:
            splits.setdefault(split, []).append(file)
    return splits or {"train": inside}


def glob_matches(pattern: str, path: str) -> bool:
    """Whether a path in a repository matches a pattern: * within a folder, ** across."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]+\])", pattern.removeprefix("./"))
    special = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    regex = "".join(
        special.get(part)
        or (part if part.startswith("[") and part.endswith("]") else re.escape(part))
        for part in parts
    )
    return re.fullmatch(regex, path) is not None


def _written(readme: str) -> dict[str, HubConfig]:
    """The configurations in the YAML at the top of a README."""
    import yaml

    found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", readme, re.DOTALL)
    try:
        head = yaml.safe_load(found[1]) if found else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    entries = head.get("configs") if isinstance(head, dict) else None
    configs: dict[str, HubConfig] = {}
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict) and "config_name" in entry:
            name = str(entry["config_name"])
            made = HubConfig(
                name,
                _patterns(entry.get("data_files")),
                str(entry["data_dir"]) + "/" if entry.get("data_dir") else "",
            )
            # The default one first: it is taken where none is asked for.
            configs = (
                {name: made, **configs}
                if entry.get("default") or name == "default"
                else {**configs, name: made}
            )
    return configs


def _patterns(written: Any) -> dict[str, list[str]] | None:
    """`data_files` as it may be written: a pattern, several, a mapping of splits, or a list of
    {split, path}."""
    if written is None:
        return None
    if isinstance(written, dict):
        return {str(split): _listed(paths) for split, paths in written.items()}
    if isinstance(written, list) and all(isinstance(item, dict) for item in written):
        return {
            str(item["split"]): _listed(item["path"])
            for item in written
            if "split" in item and "path" in item
        }
    return {"train": _listed(written)}


def _listed(paths: Any) -> list[str]:
    return [str(path) for path in (paths if isinstance(paths, list) else [paths])]


def _one_of(configs: dict[str, HubConfig], name: str | None, where: str) -> HubConfig:
    if name is not None:
        if name not in configs:
            raise ConfigError(
                f"{where} has no configuration {name!r}",
                remedy=f"give --config-name with one of: {', '.join(configs)}",
            )
        return configs[name]
    first = next(iter(configs))
    if len(configs) > 1 and first != "default":
        raise ConfigError(
            f"{where} has the configurations {', '.join(configs)}",
            remedy=f"choose one: --config-name {first}",
        )
    return configs[first]


def _folders(files: list[str], folder: str) -> dict[str, list[str]]:
    names = sorted({file.split("/")[1] for file in files if file.startswith(f"{folder}/")})
    return {name.removeprefix("partial-"): [f"{folder}/{name}/*"] for name in names}


def _split_of(file: str) -> str | None:
    """The split that a file's name tells: data/train-00000-of-00002.parquet, test.jsonl,
    dev/part1.json."""
    folder, _, name = file.rpartition("/")
    shard = _SHARD.match(name)
    if shard is not None and folder in ("data", ""):
        return shard["split"]
    for part in (os.path.basename(name), *reversed(folder.split("/"))):
        words = re.split(r"[^a-zA-Z]+", part)
        for split, keywords in _KEYWORDS.items():
            if any(word in keywords for word in words):
                return split
    return None
