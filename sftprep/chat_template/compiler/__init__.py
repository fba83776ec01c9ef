"""The compiler of chat templates: from a syntax tree to one Python function."""
