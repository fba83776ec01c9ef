"""Texts to token ids: loading a tokenizer, encoders, and the proof that they are equal."""
