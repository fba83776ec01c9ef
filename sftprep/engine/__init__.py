"""The three passes of a build, and who runs them."""
