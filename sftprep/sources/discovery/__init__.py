"""Discovery of the files of an input.

An input names them by a pattern, a folder, a saved data set, or a repository on the Hub.
"""
