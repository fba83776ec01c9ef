"""Streams: packs that are created during training, from corpora that are not prepared first."""

from sftprep.stream.packed_stream import PackedStream, Placed, State, open_stream
from sftprep.stream.sources.mixture import Mixture

__all__ = ["Mixture", "PackedStream", "Placed", "State", "open_stream"]
