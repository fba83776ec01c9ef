"""The three passes of a build, and the modules that they consist of."""
