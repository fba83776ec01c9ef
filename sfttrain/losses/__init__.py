"""Losses, and the part of them that a router adds."""
