"""Losses of trained positions."""
