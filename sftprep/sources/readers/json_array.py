"""JSON documents: the elements of one array, read as a stream and written a line each.

An element is found by parsing it, and its own bytes are handed on: nothing about it changes, not
even the text of a number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from sftprep.errors import InputUnreadable
from sftprep.sources.readers.lines import LARGEST_LINE, Piece, line_pieces, unpacked_chunks
from sftprep.sources.readers.to_jsonl import unusable_line

_DATA_KEYS = ("data", "train", "rows", "records", "examples")
"""Keys under which a document of one object may hold its array of records."""

_DESCRIBING_KEYS = ("features",)
"""Keys of arrays of objects that describe records, as in what the Hub answers."""

_BLANK = " \t\r\n"
_NUMBER = "-0123456789"
_STRUCTURE = re.compile(r'\\.|["\[\]{}]', re.DOTALL)
"""What decides where a value ends: escapes, quotes and brackets."""
_AFTER = tuple(_BLANK + ",]}:")
_CHUNK = 1 << 20


def document_pieces(file: str, target: int) -> Iterator[Piece]:
    """The records of a .json file, a line each, in pieces of about `target` bytes.

    The file may be an array of objects, an object that holds one such array, under a key like
    "data", or, as is common, JSON lines by another name. It is never held in memory whole. Raises
    InputUnreadable where it is damaged, or holds several arrays of records.
    """
    document = _Document(file)
    opening = document.peek()
    if opening == "{" and document.first_line_is_whole():
        yield from line_pieces(file, target)
        return
    if opening == "{":
        document.enter_object()
    elif opening == "[":
        document.skip(1)
    elif opening:
        raise document.damaged("it starts with neither [ nor {")
    else:
        return
    rows = start = size = 0
    lines: list[bytes] = []
    for line in document.elements():
        lines.append(line)
        size += len(lines[-1])
        rows += 1
        if size >= target:
            yield start, rows, b"".join(lines)
            lines, size, start = [], 0, rows
    # Before the last records are handed on: a file that is not what it seems is no part of a build.
    document.leave(inside_object=opening == "{")
    if lines:
        yield start, rows, b"".join(lines)


class _Document:
    """A JSON text read from its start, with as much of it in memory as one element needs."""

    def __init__(self, file: str) -> None:
        self._file = file
        # Bytes that are no UTF-8 pass through: the record that holds them is rejected, not the
        # file.
        self._chunks = unpacked_chunks(file, _CHUNK)
        self._undecoded = b""
        self._text = ""
        self._at = 0
        self._before = 0  # characters that are not held any more
        self._ended = False
        # The end of a value is looked for, and not its number: Python makes no integer of more
        # than 4,300 digits.
        self._parse = json.JSONDecoder(parse_int=str).raw_decode
        self._arrays: list[str] = []
        """Keys of the arrays of records that were found in the object."""

    def peek(self) -> str:
        """The next character that is no blank; empty at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _BLANK:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def skip(self, characters: int) -> None:
        """Go on."""
        self._at += characters

    def first_line_is_whole(self) -> bool:
        """Whether the first line is an object by itself, as in JSON lines."""
        while (
            "\n" not in self._text[self._at :] and len(self._text) < LARGEST_LINE and self._more()
        ):
            pass
        line, newline, _ = self._text[self._at :].partition("\n")
        rest = self._at + len(line)
        while not self._text[rest:].strip(_BLANK) and self._more():
            pass
        after = self._text[rest:].lstrip(_BLANK)[:1]
        try:
            value, end = self._parse(line)
        except (ValueError, RecursionError):
            # A first line that is broken, of a file whose second line starts an object too: lines,
            # the first of them bad.
            return newline == "\n" and after == "{"
        alone = not after and any(_is_table(value.get(key)) for key in _DATA_KEYS)
        return not line[end:].strip(_BLANK) and not alone

    def enter_object(self) -> None:
        """Go into the array under the first of the usual keys of an object; what stands before it
        is skipped."""
        self.skip(1)
        while self.peek() not in ("}", ""):
            key = self._key()
            if self.peek() == "[" and key in _DATA_KEYS:
                self._arrays.append(key)
                self.skip(1)
                return
            self._pass_member(key)
            if self.peek() == ",":
                self.skip(1)
        raise InputUnreadable(
            f"{self._file} is one JSON object without an array of records under"
            f" {', '.join(_DATA_KEYS)}",
            remedy="write an array of objects, or JSON lines: jq -c '.KEY[]' FILE > FILE.jsonl",
        )

    def elements(self) -> Iterator[bytes]:
        """Yield a line for each element of the array in which we stand.

        One that is too long is not held in memory: its line is one that is rejected.
        """
        if self.peek() == "]":
            return
        while True:
            self.peek()
            try:
                # A newline in JSON is whitespace between values.
                text = self._value().encode("utf-8", "surrogateescape").replace(b"\n", b" ")
                yield text + b"\n"
            except _TooLongError:
                what = f"the record is longer than {LARGEST_LINE >> 20} MiB"
                shown = self._text[self._at : self._at + 400]
                yield unusable_line("line_too_long", what, shown)
                self._skip_value()
            separator = self.peek()
            if separator == "]":
                return
            if separator != ",":
                raise self.damaged(
                    "it is cut short"
                    if not separator
                    else f"there is {separator!r} where , or ] is to be"
                )
            self.skip(1)

    def leave(self, *, inside_object: bool) -> None:
        """Read what follows the array, which is nothing, or the rest of the object that it stands
        in. Raises InputUnreadable."""
        self.skip(1)
        if inside_object:
            while self.peek() == ",":
                self.skip(1)
                self._pass_member(self._key())
            if self.peek() != "}":
                raise self.damaged("the object around the records is not closed")
            if len(self._arrays) > 1:
                raise InputUnreadable(
                    f"{self._file} holds several arrays of records: {', '.join(self._arrays)}",
                    remedy="write each to a file of its own, and name those that you mean: "
                    f"jq -c '.{self._arrays[0]}[]' FILE > {self._arrays[0]}.jsonl",
                )
            self.skip(1)
        if self.peek():
            raise self.damaged("something follows the array of records")

    def damaged(self, what: str) -> InputUnreadable:
        """The error that names the place."""
        line = self._text.count("\n", 0, self._at) + 1
        place = f"line {line}" if not self._before else f"character {self._before + self._at + 1:,}"
        return InputUnreadable(
            f"{self._file} is no JSON that can be read: {what} ({place})",
            remedy="make the file again, or convert it to JSON lines",
        )

    def _key(self) -> str:
        try:
            key = self._value()
        except _TooLongError as error:
            raise self.damaged("a key is not closed") from error
        if self.peek() != ":":
            raise self.damaged("a colon is missing")
        self.skip(1)
        return str(self._parse(key)[0])

    def _value(self) -> str:
        """The text of the value that starts here."""
        self.peek()
        while True:
            start = self._at
            try:
                _, end = self._parse(self._text, start)
                # A number at the edge of what was read may go on behind it.
                if (
                    self._ended
                    or self._text[start] not in _NUMBER
                    or self._text[end : end + 1] in _AFTER
                ):
                    self._at = end
                    return self._text[start:end]
            except RecursionError as error:
                raise self.damaged("it is nested too deeply") from error
            except json.JSONDecodeError as error:
                # What is wrong at the edge of what was read may be right with the rest of it.
                if self._ended or (
                    error.pos < len(self._text) - 64 and "Unterminated" not in error.msg
                ):
                    self._at = min(error.pos, len(self._text))
                    raise self.damaged(
                        "it is cut short"
                        if self._ended and error.pos >= len(self._text)
                        else error.msg
                    ) from error
            # What was handed on is let go; only here, so that a small value does not cost a copy of
            # all that was read.
            self._text, self._before, self._at = self._text[start:], self._before + start, 0
            if len(self._text) > LARGEST_LINE:
                raise _TooLongError
            # Each time twice as much, so that a long element is not parsed again for every chunk.
            wanted = 2 * len(self._text)
            while self._more() and len(self._text) < wanted:
                pass

    def _pass_member(self, key: str) -> None:
        """Pass over the value of a key of the object, and note it if it is an array of records."""
        if self.peek() == "[":
            # Brackets at the edge of what was read: the first element tells.
            while not self._text[self._at + 1 :].strip(_BLANK) and self._more():
                pass
            first = self._text[self._at + 1 :].lstrip(_BLANK)[:1]
            if key in _DATA_KEYS or (first == "{" and key not in _DESCRIBING_KEYS):
                self._arrays.append(key)
        self._pass_value()

    def _pass_value(self) -> None:
        """Pass over the value that starts here, whatever its length."""
        try:
            self._value()
        except _TooLongError:
            self._skip_value()

    def _skip_value(self) -> None:
        """Pass over an object, an array or a string, with no more than a chunk of it in memory."""
        depth, in_string = 0, False
        while True:
            for found in _STRUCTURE.finditer(self._text, self._at):
                sign = found[0]
                if sign == '"':
                    in_string = not in_string
                elif not in_string and sign[0] != "\\":
                    depth += 1 if sign in "[{" else -1
                if depth <= 0 and not in_string:
                    self._at = found.end()
                    return
            # A backslash at the edge belongs to the character that comes next.
            rest = self._text[-1:] if _ends_in_escape(self._text) else ""
            self._before += len(self._text) - len(rest)
            self._text, self._at = rest, 0
            if not self._more():
                raise self.damaged("it is cut short")

    def _more(self) -> bool:
        """Read a chunk; False at the end."""
        if self._ended:
            return False
        chunk = next(self._chunks)
        data = self._undecoded + chunk
        if not chunk:
            self._ended = True
            self._text += data.decode("utf-8", "surrogateescape")
            return bool(data)
        keep = _whole_characters(data)
        text = data[:keep].decode("utf-8", "surrogateescape")
        if not self._before and not self._text:
            text = text.removeprefix("\ufeff")
        self._text += text
        self._undecoded = data[keep:]
        return True


class _TooLongError(Exception):
    """A value is longer than what is held in memory."""


def _ends_in_escape(text: str) -> bool:
    """Whether the last character is a backslash that belongs to the next one."""
    return (len(text) - len(text.rstrip("\\"))) % 2 == 1


def _is_table(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _whole_characters(data: bytes) -> int:
    """Bytes before a character that is cut at the end."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte < 0x80:
            return len(data)
        if byte >= 0xC0:  # the first byte of a character, which tells its length
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) - back if length > back else len(data)
    return len(data)
