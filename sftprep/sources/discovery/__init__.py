"""Which files an input names: patterns, folders, saved data sets, and repositories on the Hub."""
