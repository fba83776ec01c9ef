"""The first records of an input: how they are read, what is not, and what to try instead."""
