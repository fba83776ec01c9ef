"""Where the records of a stream come from, in blocks for each lane."""
