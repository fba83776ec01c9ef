"""The settings by which a build of layout `sequences` is planned while it is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sftprep.config.validation import (
    Order,
    Packing,
    TruncateSide,
    check_choice,
    check_integer,
)
from sftprep.errors import ConfigError, ManifestError, setting
from sftprep.packing.cut import CUTS
from sftprep.shards.manifest import Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class PackSettings:
    """What determines the packs of stored sequences. The names are those of a build's settings.

    Attributes:
        max_length: Tokens in a pack, and the maximum length of a sequence.
        packing: The strategy, a key of `STRATEGIES`.
        overlong: The treatment of longer sequences, a key of `CUTS`.
        truncate_side: The end at which a sequence is truncated.
        order: "shuffle", or "keep" for the order of packing.
        seed: The seed of the order of the packs.

    Raises:
        ConfigError: A value is invalid.
    """

    max_length: int
    packing: str = "bfd"
    overlong: str = "truncate"
    truncate_side: str = "right"
    order: str = "shuffle"
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer(self.max_length, setting("max_length"), 2, 2**31 - 1)
        check_choice(setting("packing"), self.packing, Packing)
        if self.overlong not in CUTS:
            raise ConfigError(
                f"{setting('overlong')} is {self.overlong!r}",
                remedy=f"choose one of: {', '.join(CUTS)}",
            )
        check_choice(setting("truncate_side"), self.truncate_side, TruncateSide)
        check_choice(setting("order"), self.order, Order)
        check_integer(self.seed, setting("seed"), 0, 2**64 - 1)
        if self.packing == "bfd_split":  # as in a build, the name of TRL for two settings
            object.__setattr__(self, "packing", "bfd")
            object.__setattr__(self, "overlong", "split")
        if self.packing == "wrapped" and self.overlong != "truncate":
            raise ConfigError(
                f"{setting('overlong', self.overlong)} has no effect with"
                f" {setting('packing', 'wrapped')}, which has no overlong sequences",
                remedy=[f"leave out {setting('overlong')}", f"choose {setting('packing', 'bfd')}"],
            )

    @classmethod
    def of_build(cls, manifest: Manifest) -> PackSettings:
        """Return the settings of a build, which apply unless others are requested.

        Raises:
            ManifestError: The manifest has an invalid one.
        """
        names = ("packing", "overlong", "truncate_side", "order", "seed")
        values: dict[str, Any] = {name: manifest.config.get(name) for name in names}
        try:
            if None in values.values():
                raise ConfigError("one of them is missing", remedy="")
            return cls(max_length=manifest.max_length, **values)
        except (ConfigError, TypeError) as error:
            raise ManifestError(
                f"the manifest of {manifest.folder} has invalid settings of the packing: {error}",
                remedy="build it again",
            ) from error

    def replaced_by(self, **requested: Any) -> PackSettings:
        """Return these settings with those that are not None replaced.

        Raises:
            ConfigError: A value is invalid.
        """
        known = {name: value for name, value in requested.items() if value is not None}
        if known.get("packing") == "wrapped":
            known.setdefault("overlong", "truncate")
        return replace(self, **known)
