"""Checks of the files of a finished build, which run on any machine and in any order."""
