"""The rules of `datasets` for the configurations and splits of a repository.

Only the names of the files and the README are needed, so that only the files of the requested split
are downloaded. `datasets` itself is not a dependency; the tests compare the result with it.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from sftprep.errors import ConfigError, setting
from sftprep.sources.discovery.file_types import kind_of

_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"(?P<split>[\w.]+)-\d{5}-of-\d{5}\b", re.ASCII)


@dataclass(frozen=True, slots=True)
class HubConfig:
    """A configuration of a data set.

    Attributes:
        name: Its name.
        splits: Split -> patterns of its files; None if the names of the files determine the split.
        folder: The folder of its files, with a slash at its end; "" for the whole repository.
    """

    name: str
    splits: dict[str, list[str]] | None
    folder: str = ""


def choose_config(readme: str, files: list[str], name: str | None, where: str) -> HubConfig:
    """Return the requested configuration, or the default one.

    Args:
        readme: The text of the README.
        files: The paths of the data files.
        name: The requested configuration, or None.
        where: What has the configurations, for errors: "the data set org/name".

    Raises:
        ConfigError: The requested configuration does not exist, or one must be chosen.
    """
    configs = _parse_readme(readme)
    if configs:
        return _choose(configs, name, where)
    # Without an entry in the README, each folder is a configuration if all files have the form
    # config/split/file, as the Parquet files have that the Hub creates.
    folders = sorted({file.split("/")[0] for file in files if file.count("/") == 2})
    if folders and all(file.count("/") == 2 for file in files):
        splits = {folder: _splits_of_folder(files, folder) for folder in folders}
        return _choose(
            {folder: HubConfig(folder, splits[folder]) for folder in folders}, name, where
        )
    if name in (None, "default"):
        return HubConfig("default", None)
    inside = [file for file in files if file.startswith(f"{name}/")]
    if not inside:
        raise ConfigError(
            f"{where} has no configuration {name!r}",
            remedy=f"leave out {setting('config_name')}, or look at the page of the data set",
        )
    return HubConfig(str(name), None, f"{name}/")


def files_of_splits(
    config: HubConfig, files: list[str], *, one_kind: bool = True
) -> dict[str, list[str]]:
    """Return the files of each split of a configuration, without empty splits.

    Args:
        config: The configuration.
        files: The paths of the data files.
        one_kind: Where names determine the split, use only files of the most common kind, as
            `datasets` does: repositories often have copies of the same data in other formats.

    Example:
        config = HubConfig("default", None), files = ["train.jsonl", "dev.jsonl"]  ->
            {"train": ["train.jsonl"], "validation": ["dev.jsonl"]}
    """
    if config.splits is not None:
        found = {
            split: [f for f in files if any(glob_matches(p, f) for p in patterns)]
            for split, patterns in config.splits.items()
        }
        return {split: members for split, members in found.items() if members}
    inside = [file for file in files if file.startswith(config.folder)]
    if one_kind and inside:
        kinds = Counter(kind_of(file) for file in inside)
        most_common = max(kinds, key=lambda kind: (kinds[kind], str(kind)))
        inside = [file for file in inside if kind_of(file) == most_common]
    splits: dict[str, list[str]] = {}
    for file in inside:
        split = _split_in_name(file.removeprefix(config.folder))
        if split is not None:
            splits.setdefault(split, []).append(file)
    # If no name contains a split, all files are train.
    return splits or {"train": inside}


def glob_matches(pattern: str, path: str) -> bool:
    """Return whether a path in a repository matches a pattern.

    `*` does not match a slash, `**` does.
    """
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]+\])", pattern.removeprefix("./"))
    special = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    regex = "".join(
        special.get(part)
        or (part if part.startswith("[") and part.endswith("]") else re.escape(part))
        for part in parts
    )
    return re.fullmatch(regex, path) is not None


def _parse_readme(readme: str) -> dict[str, HubConfig]:
    """Return the configurations in the YAML block at the start of a README."""
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
            config = HubConfig(
                name,
                _to_patterns(entry.get("data_files")),
                str(entry["data_dir"]) + "/" if entry.get("data_dir") else "",
            )
            # The first configuration is the default one; see `_choose`.
            configs = (
                {name: config, **configs}
                if entry.get("default") or name == "default"
                else {**configs, name: config}
            )
    return configs


def _to_patterns(data_files: Any) -> dict[str, list[str]] | None:
    """Return split -> patterns for each permitted form of `data_files`.

    It may be a pattern, a list of patterns, a mapping of splits, or a list of {split, path}.
    """
    if data_files is None:
        return None
    if isinstance(data_files, dict):
        return {str(split): _to_strings(paths) for split, paths in data_files.items()}
    if isinstance(data_files, list) and all(isinstance(item, dict) for item in data_files):
        return {
            str(item["split"]): _to_strings(item["path"])
            for item in data_files
            if "split" in item and "path" in item
        }
    return {"train": _to_strings(data_files)}


def _to_strings(paths: Any) -> list[str]:
    return [str(path) for path in (paths if isinstance(paths, list) else [paths])]


def _choose(configs: dict[str, HubConfig], name: str | None, where: str) -> HubConfig:
    first = next(iter(configs))
    example = setting("config_name", first)
    if name is not None:
        if name not in configs:
            raise ConfigError(
                f"{where} has no configuration {name!r}",
                remedy=f"choose one of {', '.join(configs)}: {example}",
            )
        return configs[name]
    if len(configs) > 1 and first != "default":
        raise ConfigError(
            f"{where} has the configurations {', '.join(configs)}",
            remedy=f"choose one: {example}",
        )
    return configs[first]


def _splits_of_folder(files: list[str], folder: str) -> dict[str, list[str]]:
    names = sorted({file.split("/")[1] for file in files if file.startswith(f"{folder}/")})
    # The Hub prefixes the split with "partial-" where it converted only the first part of the data.
    return {name.removeprefix("partial-"): [f"{folder}/{name}/*"] for name in names}


def _split_in_name(file: str) -> str | None:
    """Return the split in the path of a file, or None.

    Example:
        "data/train-00000-of-00002.parquet" -> "train", "dev/part1.json" -> "validation"
    """
    folder, _, name = file.rpartition("/")
    shard = _SHARD.match(name)
    if shard is not None and folder in ("data", ""):
        return shard["split"]
    # The name of the file comes first, then its folders, the innermost first.
    for part in (os.path.basename(name), *reversed(folder.split("/"))):
        words = re.split(r"[^a-zA-Z]+", part)
        for split, keywords in _KEYWORDS.items():
            if any(word in keywords for word in words):
                return split
    return None
