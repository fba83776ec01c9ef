"""Encoders, which turn strings into token ids: the reference encoder and a fast one."""
