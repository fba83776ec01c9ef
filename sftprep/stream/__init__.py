"""Packs on the fly, from corpora that are too large, too fresh or too private to prepare first."""

from sftprep.stream.mixture import Mixture
from sftprep.stream.packed import PackedStream, Placed, State, pack

__all__ = ["Mixture", "PackedStream", "Placed", "State", "pack"]
