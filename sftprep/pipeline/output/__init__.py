"""The output of a build: its folder, the files in it, and the fields of its manifest."""
