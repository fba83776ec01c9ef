"""The sources of records: their files, partitions, lines and JSON objects."""
