"""Encoders from strings to token ids: the reference encoder and a fast one."""
