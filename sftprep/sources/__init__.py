"""Where records come from: files found, cut into partitions, read into lines and JSON objects."""
