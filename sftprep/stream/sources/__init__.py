"""Sources of a stream: where its records come from, in blocks for each lane."""
