"""What a build would make of its records, without writing it: previews, and verdicts."""
