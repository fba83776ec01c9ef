"""Rendering of examples to strings, and descriptions of their trained parts."""
