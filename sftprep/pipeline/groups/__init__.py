"""The groups of a build: their tasks, and what is decided across groups."""
