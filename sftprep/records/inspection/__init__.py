"""Inspection of the first records of an input: what is not read, and what to try."""
