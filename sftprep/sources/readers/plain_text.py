"""Plain text files as lines of JSON: one record per line, or per file."""

from __future__ import annotations

from collections.abc import Iterator

import orjson

from sftprep.sources.readers.lines import LARGEST_LINE, FilePart, unpacked_blocks, unpacked_chunks
from sftprep.sources.readers.to_jsonl import unusable_line

_BOM = b"\xef\xbb\xbf"


def text_line_parts(file: str, target: int) -> Iterator[FilePart]:
    """Yield the lines of a text file as records, in parts of about `target` bytes.

    Lines of whitespace stay empty, so that the numbers of lines are those of the file.

    Raises:
        InputUnreadable: The file is damaged or cannot be read.
    """
    number = 0
    for position, block in unpacked_blocks(file, target):
        if not block:
            continue
        lines = (block if position else block.removeprefix(_BOM)).split(b"\n")
        if not lines[-1]:
            lines.pop()
        yield number, number + len(lines), b"".join(map(_to_record, lines))
        number += len(lines)


def text_file_parts(file: str, target: int) -> Iterator[FilePart]:
    """Yield a text file as one record.

    Raises:
        InputUnreadable: The file is damaged or cannot be read.
    """
    chunks: list[bytes] = []
    for chunk in unpacked_chunks(file, target):
        chunks.append(chunk)
        if sum(map(len, chunks)) > LARGEST_LINE:
            break
    text = b"".join(chunks).removeprefix(_BOM).replace(b"\r\n", b"\n")
    yield 0, 1, _to_record(text.rstrip(b"\n"))


def _to_record(text: bytes) -> bytes:
    if not text.strip():
        return b"\n"
    if len(text) > LARGEST_LINE:
        message = f"the text is longer than {LARGEST_LINE >> 20} MiB"
        return unusable_line("line_too_long", message, text[:200].decode("utf-8", "replace"))
    try:
        record = {"text": text.removesuffix(b"\r").decode()}
    except UnicodeDecodeError as error:
        message = f"byte 0x{text[error.start]:02x} is not UTF-8"
        return unusable_line("bad_utf8", message, text[:200].decode("utf-8", "replace"))
    return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)
