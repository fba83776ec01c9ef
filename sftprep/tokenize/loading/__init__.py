"""Loading of a tokenizer to its specification.

The tokenizer is a name, a folder or a live object.
"""
