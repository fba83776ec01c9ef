"""Texts to ids: which tokenizer (load, spec), which encoder (probe, fast, hf), and whether it tells
the truth (probe, spot)."""
