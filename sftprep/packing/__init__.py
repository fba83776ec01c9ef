"""Packing: planning of packs by pure functions of the sequence lengths.

A plan says which sequences share a pack.
"""

from sftprep.packing.counts import Moves, plan_counts
from sftprep.packing.strategies import PackPlan, pack_lengths

__all__ = ["Moves", "PackPlan", "pack_lengths", "plan_counts"]
