"""The files of layout `sequences`: one row per sequence, and an index of each group."""
