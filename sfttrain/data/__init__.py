"""Preparation of datasets, and their packs as batches of a training step."""
