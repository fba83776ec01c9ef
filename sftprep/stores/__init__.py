"""Object stores: builds and inputs at URLs, through fsspec.

`folder_of` is the only entry point: it returns a local folder, or a folder in a store with the
operations that a store has. There are no renames, no locks and no folders in a store; objects
appear as a whole, and the conditional writes `create` and `replace` are the only way to decide
between writers.
"""

from sftprep.config.validation import is_url
from sftprep.stores.cache import copy_of_input, fresh_file, local_file
from sftprep.stores.folder import (
    PROBE_PREFIX,
    BuildFolder,
    Mark,
    StoredFile,
    StoreFolder,
    folder_of,
    list_files,
    marks_of,
    size_of_object,
)
from sftprep.stores.range_file import least_size, open_object

__all__ = [
    "PROBE_PREFIX",
    "BuildFolder",
    "Mark",
    "StoreFolder",
    "StoredFile",
    "copy_of_input",
    "folder_of",
    "fresh_file",
    "is_url",
    "least_size",
    "list_files",
    "local_file",
    "marks_of",
    "open_object",
    "size_of_object",
]
