"""Encoders of texts: the reference, and a faster one."""
