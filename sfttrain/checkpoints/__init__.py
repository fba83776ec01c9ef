"""Checkpoints and output folders: what is ours, what is complete, and what a run resumes from."""
