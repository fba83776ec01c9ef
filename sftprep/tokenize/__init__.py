"""Tokenization: loading of tokenizers, encoders, and their equivalence."""
