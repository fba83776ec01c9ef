"""The three passes of a build, and their modules."""
