"""Shards: Arrow files of packed sequences, and the manifest of a build.

The names below are public. They are for programs that store files in the folder of a build, or that
write folders of their own in the same way: atomically, and by one process at a time; and for those
that show the warnings of a build.
"""

from sftprep.core.atomic_write import (
    is_temporary_name,
    storage_errors,
    temporary_name,
    write_bytes,
)
from sftprep.core.file_locks import hold_lock
from sftprep.shards.layout import MANIFEST_NAME, is_finished_build, tokenizer_paths
from sftprep.shards.length_advice import length_warning
from sftprep.shards.locks import exclusive
from sftprep.shards.warning_kinds import DataWarning, data_warnings

__all__ = [
    "MANIFEST_NAME",
    "DataWarning",
    "data_warnings",
    "exclusive",
    "hold_lock",
    "is_finished_build",
    "is_temporary_name",
    "length_warning",
    "storage_errors",
    "temporary_name",
    "tokenizer_paths",
    "write_bytes",
]
