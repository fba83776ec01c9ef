"""Exports of finished builds in the formats of other tools."""
