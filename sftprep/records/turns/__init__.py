"""Conversations in records: roles, contents, calls, and switches of single turns."""
