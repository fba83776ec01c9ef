"""Object stores: builds and inputs at URLs, through fsspec.

`folder_of` is the only entry point: it returns a local folder, or a folder in a store with the
operations that a store has. A store has neither renames nor locks; objects appear as a whole, and
only the conditional writes `create` and `replace` decide between writers.
"""

from sftprep.config.validation import is_url
from sftprep.stores.folder import Mark, StoredFile, StoreFolder, folder_of

__all__ = ["Mark", "StoreFolder", "StoredFile", "folder_of", "is_url"]
