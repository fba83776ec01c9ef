"""Checkpoints and output folders: ownership of files, completeness, and resuming."""
