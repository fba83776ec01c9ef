"""Object stores: builds and inputs at URLs, through fsspec.

`folder_of` is the entry point: it returns a local folder, or a folder in a store with the
operations that a store has. A store has neither renames nor locks; objects appear as a whole, and
only the conditional writes `create` and `replace` decide between writers. Data sets on the Hub are
read as folders too, each at one commit; `hub.py` writes to them.
"""

from sftprep.config.validation import is_url
from sftprep.stores.folder import Mark, StoredFile, StoreFolder, folder_of, list_files
from sftprep.stores.hub_error_conversion import hub_errors, hub_reason

__all__ = [
    "Mark",
    "StoreFolder",
    "StoredFile",
    "folder_of",
    "hub_errors",
    "hub_reason",
    "is_url",
    "list_files",
]
