"""The command `sfttrain`."""
