"""Central types, and general helpers independent of the pipeline."""
