"""Tokenization: loading a tokenizer, encoders, and the check that the encoders are equivalent."""
