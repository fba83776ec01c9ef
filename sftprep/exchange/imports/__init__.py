"""Conversion of the settings of other tools to those of a build."""
