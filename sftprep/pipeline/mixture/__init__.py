"""The shares of the sources of a mixture."""
