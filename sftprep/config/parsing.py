"""Parsing of YAML and JSON in which a user writes settings.

A key that occurs twice is an error: the parsers would silently use its last value.
"""

from __future__ import annotations

import json
from typing import Any

from sftprep.errors import ConfigError


def parse_yaml(text: str, label: str) -> Any:
    """Return the value of a YAML document.

    Args:
        text: The document.
        label: What it is, for errors.

    Raises:
        ConfigError: A mapping has a key twice.
        yaml.YAMLError: It is not YAML.
        ValueError: It has a value that Python cannot represent.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """The safe loader, which reports repeated keys."""

        def compose_mapping_node(self, anchor: Any) -> Any:
            # Merged mappings (`<<: *base`), whose keys may be replaced, are inserted later.
            node = super().compose_mapping_node(anchor)
            seen = set()
            for key, _ in node.value:
                identity = (key.tag, str(key.value))
                if identity in seen:
                    raise _repeated(label, key.value, f" (line {key.start_mark.line + 1})")
                seen.add(identity)
            return node

    return yaml.load(text, Loader)


def parse_json(text: str, label: str) -> Any:
    """Return the value of a JSON text.

    Args:
        text: The text.
        label: What it is, for errors.

    Raises:
        ConfigError: An object has a key twice.
        ValueError: It is not JSON.
    """

    def to_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise _repeated(label, key)
            found[key] = value
        return found

    return json.loads(text, object_pairs_hook=to_object)


def _repeated(label: str, key: object, where: str = "") -> ConfigError:
    return ConfigError(f"{label} has {key!r} twice{where}", remedy="keep one of them")
