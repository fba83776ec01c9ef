"""Names of keys of records: known pairs, and those that suggest content."""
