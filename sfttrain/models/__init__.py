"""Loading and preparation of models, tokenizers and adapters."""
