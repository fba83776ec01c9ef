"""Whether the fast encoder gives what `tokenizers` gives."""
