"""Rendering of examples to strings, and the description of what is trained in them."""
