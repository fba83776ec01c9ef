"""Which files are meant by paths, globs and folders, and of what kind each is."""

from __future__ import annotations

import glob
import json
import os
from pathlib import Path

from sftprep.errors import ConfigError, FormatError, InputNotFound
from sftprep.sources.lines import COMPRESSION

SUFFIXES: dict[str, str] = {
    **{
        f"{name}{packed}": "lines"
        for name in (".jsonl", ".ndjson")
        for packed in ("", *COMPRESSION)
    },
    **{f".json{packed}": "document" for packed in ("", *COMPRESSION)},
    **{
        f"{name}{packed}": "delimited" for name in (".csv", ".tsv") for packed in ("", *COMPRESSION)
    },
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
}
"""How the name of a file ends -> its kind, a key of `sources.partition.KINDS`."""

_ABOUT_DATA = frozenset(
    {
        "dataset_info.json",
        "dataset_infos.json",
        "dataset_dict.json",
        "state.json",
        "manifest.json",
        "metadata.json",
        "config.json",
    }
)
"""Files beside data that hold none; in a folder they are passed over."""

SAVED_SPLITS = "dataset_dict.json"


def kind_of(file: str) -> str | None:
    """The kind of a file by its name, None where it is not read."""
    name = os.path.basename(file)
    return next((kind for suffix, kind in SUFFIXES.items() if name.endswith(suffix)), None)


def is_data(path: str) -> bool:
    """Whether a path in a folder is of a file that is read: not one about the data, and in no
    hidden folder."""
    return (
        kind_of(path) is not None
        and os.path.basename(path) not in _ABOUT_DATA
        and not f"/{path}".count("/.")
    )


def find_files(inputs: tuple[str, ...], split: str | None = None) -> list[str]:
    """The files that paths, globs and folders name, in the order given, sorted within each.

    split: of a folder made by `DatasetDict.save_to_disk`, train where it is not given; of another
    folder, all its files where it is not given, else those whose names tell that split, as on the
    Hub. Raises InputNotFound, FormatError (a kind of file that is not read), ConfigError (the same
    file twice, a split to choose).
    """
    if not inputs:
        raise ConfigError(
            "no input is given",
            remedy="name a .jsonl file, a glob or a folder: sftprep build data.jsonl ...",
        )
    files = [file for name in inputs for file in _expand(name, split)]
    refuse_twice(files)
    return files


def refuse_twice(files: list[str]) -> None:
    """Raises ConfigError where a file is among them twice."""
    seen: set[str] = set()
    for file in files:
        real = os.path.realpath(file)
        if real in seen:
            raise ConfigError(
                f"{file} is named twice among the inputs",
                remedy=(
                    "name it once; to train its records more often, give it a repeat in a mixture"
                    " (--config, sources:)"
                ),
            )
        seen.add(real)


def choose_split(splits: list[str], split: str | None, where: str) -> str:
    """The split asked for, else train, else the only one. Raises ConfigError."""
    if split is not None:
        if split not in splits:
            raise ConfigError(
                f"{where} has no split {split!r}",
                remedy=f"give --split with one of: {', '.join(splits)}",
            )
        return split
    if "train" in splits:
        return "train"
    if len(splits) == 1:
        return splits[0]
    raise ConfigError(
        f"{where} has the splits {', '.join(splits)}",
        remedy=f"choose one with --split {splits[0] if splits else ''}",
    )


def _expand(name: str, split: str | None) -> list[str]:
    path = Path(name)
    if path.is_dir():
        return _inside(path, split)
    if split not in (None, "train"):
        raise ConfigError(
            f"{name} has no split {split!r}: files have none",
            remedy="name the file that you mean, or a folder",
        )
    if path.exists():
        if kind_of(name) is None:
            raise FormatError(
                f"{name} is not a kind of file that is read: {', '.join(SUFFIXES)}",
                remedy=(
                    "convert it to JSON lines, one object a line, or rename it if it is one of"
                    " these already"
                ),
            )
        return [name]
    matches = sorted(match for match in glob.glob(name, recursive=True) if os.path.isfile(match))
    if not matches:
        raise InputNotFound(
            f"{name} does not exist, and matches no file as a pattern",
            remedy="check the path; quote patterns: 'data/*.jsonl'",
        )
    wrong = [match for match in matches if kind_of(match) is None]
    if wrong:
        raise FormatError(
            f"{name} matches {wrong[0]}, which is not a kind of file that is read:"
            f" {', '.join(SUFFIXES)}",
            remedy="narrow the pattern",
        )
    return matches


def _inside(folder: Path, split: str | None) -> list[str]:
    """The data files in a folder, those of hidden folders left out."""
    if (folder / SAVED_SPLITS).is_file():
        splits = json.loads((folder / SAVED_SPLITS).read_bytes())["splits"]
        folder = folder / choose_split(splits, split, f"the folder {folder}")
    if (folder / "manifest.json").is_file() and (folder / "shards").is_dir():
        raise FormatError(
            f"the folder {folder} is a build of sftprep: its records are tokenized already",
            remedy="give the inputs that it was built from, or train on it: sfttrain run",
        )
    found = sorted(
        str(p)
        for p in folder.rglob("*")
        if is_data(p.relative_to(folder).as_posix()) and p.is_file()
    )
    if not found:
        raise InputNotFound(
            f"the folder {folder} holds no {', '.join(SUFFIXES)} file",
            remedy="name a folder with data, or convert the files",
        )
    if split is None or (folder / "state.json").is_file():
        return found
    from sftprep.sources.hub_splits import HubConfig, files_of_splits

    splits = files_of_splits(
        HubConfig("default", None), [os.path.relpath(file, folder) for file in found]
    )
    return sorted(
        os.path.join(folder, file)
        for file in splits[choose_split(list(splits), split, f"the folder {folder}")]
    )
