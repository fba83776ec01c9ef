"""Packs on the fly, from corpora that are too large, too fresh or too private to prepare first."""

from sftprep.stream.packed_stream import PackedStream, Placed, State, open_stream
from sftprep.stream.sources.mixture import Mixture

__all__ = ["Mixture", "PackedStream", "Placed", "State", "open_stream"]
