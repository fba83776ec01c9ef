"""Conversion of a file with the settings of another tool to a config file of a build."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sftprep.config.build import BuildConfig
from sftprep.config.parsing import parse_json, parse_yaml
from sftprep.config.validation import expand_path
from sftprep.errors import ConfigError
from sftprep.exchange.imports.axolotl import convert_axolotl, is_axolotl
from sftprep.exchange.imports.converted import Conversion
from sftprep.exchange.imports.llama_factory import convert_dataset_info, is_dataset_info

_LARGEST_FILE = 16 << 20  # bytes


def import_config(
    file: str | os.PathLike[str], *, datasets: str | Sequence[str] = ()
) -> Conversion:
    """Convert a configuration of axolotl, or `dataset_info.json` of LLaMA-Factory.

    Args:
        file: The file.
        datasets: Of `dataset_info.json`, the names of the data sets to convert; all by default.

    Returns:
        The settings for `build(**settings)` or `build --config`, and a line for each one that has
        no counterpart.

    Raises:
        ConfigError: The file cannot be read, is something else, or has no data set that a build can
            read.

    Example:
        conversion = import_config("axolotl.yaml")
        print(*conversion.notes, sep="\\n")
        build(**conversion.settings, output="shards")
    """
    path = Path(expand_path(os.fspath(file), "the file"))
    content = _read(path)
    names = (datasets,) if isinstance(datasets, str) else tuple(datasets)
    if is_axolotl(content):
        if names:
            raise ConfigError(
                f"{path} has no names of data sets",
                remedy="convert all of them, and edit the result",
            )
        conversion = convert_axolotl(content)
    elif is_dataset_info(content):
        conversion = convert_dataset_info(content, os.path.abspath(path.parent), names)
    else:
        raise ConfigError(
            f"{path} is neither a configuration of axolotl, with datasets:, nor dataset_info.json"
            " of LLaMA-Factory",
            remedy="specify one of these files",
        )
    BuildConfig.of(**conversion.settings)  # raises for a value that no build accepts
    return conversion


def _read(path: Path) -> Any:
    import yaml

    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise ConfigError(
                f"{path} has more than {_LARGEST_FILE:,} bytes", remedy="specify a file of settings"
            )
        text = path.read_text(encoding="utf-8")
        parse = parse_json if path.suffix == ".json" else parse_yaml
        return parse(text, str(path))
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}", remedy="check its path"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise ConfigError(f"{path} is not {kind}: {error}", remedy="correct the file") from error
