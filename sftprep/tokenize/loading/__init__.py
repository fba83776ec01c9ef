"""Loading of a tokenizer: from a name, a folder or a live tokenizer to its specification."""
