"""Shards: packed sequences in Arrow files, and the manifest that says which of them make a
build."""
