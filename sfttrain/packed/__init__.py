"""Packed rows through a model, with attention that separates their sequences."""
