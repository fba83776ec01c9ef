"""Central types, and general helpers that do not depend on the pipeline."""
