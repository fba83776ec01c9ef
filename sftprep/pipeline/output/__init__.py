"""The output of a build: its folder, its files, and the fields of its manifest."""
