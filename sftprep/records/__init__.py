"""Parsed records to examples: formats, messages, pre-tokenized rows, and checks of quality."""
