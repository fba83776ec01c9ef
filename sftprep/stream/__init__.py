"""Streams: packs created during training, from unprepared corpora."""

from sftprep.stream.packed_stream import PackedStream, Placed, State, open_stream
from sftprep.stream.sources.mixture import Mixture

__all__ = ["Mixture", "PackedStream", "Placed", "State", "open_stream"]
