"""Records from standard input: JSON Lines, also compressed with gzip or zstd.

They are read once, as they arrive, and never all in memory.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from typing import BinaryIO

from sftprep.errors import ConfigError, InputUnreadable
from sftprep.sources.in_memory import replayed_source
from sftprep.sources.partition import PARTITION_BYTES, Source
from sftprep.sources.readers.lines import chunks_of, whole_lines

STDIN_NAME = "<stdin>"
"""The name of standard input in the manifest, in errors and in logs."""

_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_REFUSED = {
    b"PAR1": ("in Parquet format", "pass the name of the file"),
    b"ARROW1": ("in Arrow format", "pass the name of the file"),
    b"PK\x03\x04": ("a zip archive", "unpack it: unzip -p FILE | sftprep ..."),
    b"\xff\xfe": ("UTF-16", "convert it: iconv -f UTF-16 -t UTF-8 FILE | sftprep ..."),
    b"\xfe\xff": ("UTF-16", "convert it: iconv -f UTF-16 -t UTF-8 FILE | sftprep ..."),
    b"[": ("a JSON array", "convert it: jq -c '.[]' FILE | sftprep ..., or pass its name"),
}
"""The first bytes of what is not JSON Lines -> what it is, and the remedy."""


def stdin_source() -> Source:
    """Return standard input as a source.

    Raises:
        ConfigError: It is closed, or a terminal.
    """
    stream = sys.stdin
    if stream is None or stream.closed:
        raise ConfigError("stdin is closed", remedy="pipe records into the command")
    if stream.isatty():
        raise ConfigError(
            "stdin is a terminal, and not records",
            remedy="pipe records into the command: cat chats.jsonl | sftprep ...",
        )
    return replayed_source(STDIN_NAME, lambda: read_blocks(stream.buffer))


def read_blocks(stream: BinaryIO) -> Iterator[bytes]:
    """Yield blocks of whole lines of a stream, each of about the size of a partition.

    Raises:
        InputUnreadable: The stream is not JSON Lines, or it is damaged.

    Example:
        read_blocks(io.BytesIO(b'{"text": "a"}'))  ->  yields b'{"text": "a"}\\n'
    """
    chunks = chunks_of(_decompress(stream), STDIN_NAME, PARTITION_BYTES)
    for _, block in whole_lines(chunks):
        if block:
            yield block if block.endswith(b"\n") else block + b"\n"


def _decompress(stream: BinaryIO) -> BinaryIO:
    """Return a stream, decompressed if its first bytes say so."""
    start = stream.read(8)
    whole = io.BufferedReader(_Prefixed(start, stream))
    for signature, kind in _COMPRESSED.items():
        if start.startswith(signature):
            import pyarrow as pa

            unpacked: BinaryIO = pa.CompressedInputStream(pa.PythonFile(whole, "r"), kind)
            return unpacked
    for signature, (what, remedy) in _REFUSED.items():
        if start.lstrip(b"\xef\xbb\xbf \t\r\n" if signature == b"[" else b"").startswith(signature):
            raise InputUnreadable(f"stdin is {what}, and only JSON Lines are read", remedy=remedy)
    return whole


class _Prefixed(io.RawIOBase):
    """A stream whose first bytes were read already."""

    def __init__(self, start: bytes, rest: BinaryIO) -> None:
        self._start, self._rest = start, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        data = self._start[: len(buffer)] or self._rest.read(len(buffer))
        self._start = self._start[len(data) :] if self._start else b""
        buffer[: len(data)] = data
        return len(data)
