"""Checks of records after they were read: what looks wrong, and what was not read."""
