"""Packing: which sequences share a pack, planned from their lengths alone by pure functions."""

from sftprep.packing.strategies import PackPlan, pack_lengths

__all__ = ["PackPlan", "pack_lengths"]
