"""Packed sequences through a model, each one isolated from the others."""
