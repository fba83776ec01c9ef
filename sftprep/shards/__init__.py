"""Shards: packed sequences in Arrow files, and the manifest that lists those of a build.

The names below are public, for programs that keep files in the folders of builds or write folders
of their own in the same way: atomically, and one process at a time.
"""

from sftprep.core.atomic_write import is_temporary_name, storage_errors, write_bytes
from sftprep.shards.layout import MANIFEST_NAME
from sftprep.shards.locks import exclusive

__all__ = ["MANIFEST_NAME", "exclusive", "is_temporary_name", "storage_errors", "write_bytes"]
