"""Converted settings, and what has no counterpart."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

_LONGEST_VALUE = 60  # characters of a value in a note


@dataclass
class Conversion:
    """The settings of a build, as they are collected from those of another tool.

    Attributes:
        settings: The settings, by their names in a config file.
        notes: One line for each setting that is not converted, or is converted to one with a
            different effect.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def skip(self, name: str, value: object, reason: str = "") -> None:
        """Note a setting without a counterpart.

        Args:
            name: Its name in the other tool, such as `datasets[0].roles_to_train`.
            value: Its value.
            reason: What to do instead, or what happens now.
        """
        self.notes.append(f"not converted: {name}: {_shorten(value)}" + _in_parentheses(reason))

    def differ(self, name: str, value: object, difference: str) -> None:
        """Note a setting whose counterpart has another effect."""
        self.notes.append(f"different: {name}: {_shorten(value)}" + _in_parentheses(difference))

    def add_source(self, name: str, source: dict[str, Any]) -> None:
        """Add a source, or note that an earlier one has its files: a build reads a file once.

        Args:
            name: The name of the data set in the other file.
            source: Its settings.
        """
        data = _data_of(source)
        for earlier in self.settings["sources"]:
            if not data.isdisjoint(_data_of(earlier)):
                place = source.get("path") or ", ".join(source["inputs"])
                reason = "an earlier source reads this; the data set is left out"
                self.skip(name, place, f"{reason}; adjust limit, weight or repeat of that source")
                return
        self.settings["sources"].append(source)

    def to_yaml(self, title: str) -> str:
        """Return the config file: a title and the notes as comments, then the settings."""
        import yaml

        comments = "".join(f"# {line}\n" for line in (title, *self.notes))
        return comments + yaml.safe_dump(self.settings, sort_keys=False, allow_unicode=True)


@dataclass
class SourceConversion:
    """One source of a build, as it is collected.

    Attributes:
        name: The name of the data set in the other file, for notes.
        conversion: Where notes go.
        settings: The settings of the source.
    """

    name: str
    conversion: Conversion
    settings: dict[str, Any] = field(default_factory=dict)

    def skip(self, key: str, value: object, reason: str = "") -> None:
        """Note a setting of this source without a counterpart."""
        self.conversion.skip(f"{self.name}.{key}", value, reason)

    def differ(self, key: str, value: object, difference: str) -> None:
        """Note a setting of this source whose counterpart has another effect."""
        self.conversion.differ(f"{self.name}.{key}", value, difference)

    def rename(self, key: object, known: str) -> None:
        """Read a key of the records as another one, unless it has this name already."""
        if isinstance(key, str) and key != known:
            self.settings.setdefault("map", []).append(f"{key}={known}")

    def skip_rest(self, values: dict[str, Any], read: Collection[str], reason: str = "") -> None:
        """Note all settings that were not read, apart from those that are null or false."""
        for key, value in values.items():
            if key not in read and value not in (None, False):
                self.skip(key, value, reason)


def _data_of(source: dict[str, Any]) -> set[tuple[object, ...]]:
    """Return what identifies the files that a source reads, without a look into them."""
    found: set[tuple[object, ...]] = set()
    for name in [source["path"]] if "path" in source else source["inputs"]:
        path = os.path.realpath(os.path.expanduser(name))
        if os.path.isfile(path):
            found.add((path,))  # whatever the split is
        else:
            choice = (source.get(key) for key in ("config_name", "split", "revision"))
            found.add((name, *choice))
    return found


def _shorten(value: object) -> str:
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 4] + " ..."


def _in_parentheses(text: str) -> str:
    return f" ({text})" if text else ""
