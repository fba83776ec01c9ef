"""Packed rows through a model, with attention separating their sequences."""
