"""Loading a model, its tokenizer and its adapters."""
