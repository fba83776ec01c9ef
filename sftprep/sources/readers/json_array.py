"""JSON documents: the elements of one array, streamed, one per line.

1. The text of the file is read in chunks.
2. The end of the next element is found by parsing it. If the text that was read so far ends within
   the element, twice as much text is read and the element is parsed again.
3. The text of the element is copied to a line. Nothing about it changes, not even the spelling of
   a number.

The cost is about twice that of parsing the file once at most, because the text doubles each time.
Memory holds one element and one chunk; an element longer than LARGEST_LINE is skipped without being
held.
The tests compare the elements with `json.loads` of the whole file, for chunks of every size
(`tests/sources/test_kinds.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from sftprep.core.notices import Notice
from sftprep.errors import InputUnreadable, setting, source_name
from sftprep.sources.readers.lines import LARGEST_LINE, FilePart, line_parts, unpacked_chunks
from sftprep.sources.readers.to_jsonl import unusable_line

_DATA_KEYS = ("data", "train", "rows", "records", "examples")
"""Keys under which a document that is one object may have its array of records."""

_DESCRIBING_KEYS = ("features",)
"""Keys of arrays of objects that describe records, as in responses of the Hub's API."""

_reported: set[tuple[str, ...]] = set()
"""Files whose unread texts were logged, with their keys: a file is read more than once."""

_WHITESPACE = " \t\r\n"
_NUMBER = "-0123456789"
_STRUCTURE = re.compile(r'\\.|["\[\]{}]', re.DOTALL)
"""The characters that determine where a value ends: escapes, quotes and brackets."""
_AFTER_VALUE = tuple(_WHITESPACE + ",]}:")
_CHUNK = 1 << 20


def document_parts(file: str, target: int) -> Iterator[FilePart]:
    """Yield the records of a .json file, one per line, in parts.

    A part has about `target` bytes. The file may be an array of objects; an object that contains
    one such array, under a key such as "data"; or, which is common, JSON lines with the wrong
    suffix. It is never held in memory as a whole.

    Raises:
        InputUnreadable: The file is damaged, or contains several arrays of records.

    Example:
        {"version": 1, "data": [{"id": 1}, {"id": 2}]}  ->  b'{"id": 1}\\n{"id": 2}\\n'
    """
    document = _Document(file)
    opening = document.peek()
    if opening == "{" and document.is_json_lines():
        yield from line_parts(file, target)
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
    # The end is checked before the last records are yielded: a build must not be made of a file
    # that is damaged, or of one of its several arrays.
    document.leave(inside_object=opening == "{")
    if lines:
        yield start, rows, b"".join(lines)


class _Document:
    """A JSON text, read from its start with little more than one element in memory."""

    def __init__(self, file: str) -> None:
        self._file = file
        # Bytes that are not UTF-8 are passed on (`surrogateescape`), so that only the record that
        # contains them is rejected, not the file.
        self._chunks = unpacked_chunks(file, _CHUNK)
        self._undecoded = b""  # the first bytes of a character whose other bytes follow
        self._text = ""  # the text in memory
        self._position = 0  # the next character in `_text`
        self._discarded = 0  # the number of characters before `_text`
        self._ended = False  # whether the whole file was read
        # Integers are parsed as strings, because only the end of a value is needed, and Python
        # refuses to convert integers of more than 4,300 digits.
        self._parse = json.JSONDecoder(parse_int=str).raw_decode
        self._unread: list[str] = []  # keys of texts alongside the array
        self._arrays: list[str] = []  # keys of the arrays of records in the object

    def peek(self) -> str:
        """Return the next character other than whitespace, or "" at the end."""
        while True:
            while self._position < len(self._text) and self._text[self._position] in _WHITESPACE:
                self._position += 1
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._read_more():
                return ""

    def skip(self, characters: int) -> None:
        """Move the position forward."""
        self._position += characters

    def is_json_lines(self) -> bool:
        """Return whether the first line is a complete object, as in JSON lines."""
        while (
            "\n" not in self._text[self._position :]
            and len(self._text) < LARGEST_LINE
            and self._read_more()
        ):
            pass
        line, newline, _ = self._text[self._position :].partition("\n")
        rest = self._position + len(line)
        while not self._text[rest:].strip(_WHITESPACE) and self._read_more():
            pass
        following = self._text[rest:].lstrip(_WHITESPACE)[:1]
        try:
            value, end = self._parse(line)
        except (ValueError, RecursionError):
            # If the first line is malformed and the second line starts an object too, the file is
            # JSON lines with a bad first record.
            return newline == "\n" and following == "{"
        is_single = not following and any(_is_table(value.get(key)) for key in _DATA_KEYS)
        return not line[end:].strip(_WHITESPACE) and not is_single

    def enter_object(self) -> None:
        """Move to the first element of the object's array under a usual key.

        Raises:
            InputUnreadable: The object has no such array.
        """
        self.skip(1)
        while self.peek() not in ("}", ""):
            key = self._read_key()
            if self.peek() == "[" and key in _DATA_KEYS:
                self._arrays.append(key)
                self.skip(1)
                return
            self._skip_member(key)
            if self.peek() == ",":
                self.skip(1)
        raise InputUnreadable(
            f"{self._file} is one JSON object without an array of records under one of the keys"
            f" {', '.join(_DATA_KEYS)}",
            remedy="write an array of objects, or JSON lines: jq -c '.KEY[]' FILE > FILE.jsonl",
        )

    def elements(self) -> Iterator[bytes]:
        """Yield a line for each element of the entered array.

        An element that is too long is not held in memory: its line is one that is rejected.
        """
        if self.peek() == "]":
            return
        while True:
            self.peek()
            try:
                # A newline in JSON is whitespace between values.
                text = self._read_value().encode("utf-8", "surrogateescape").replace(b"\n", b" ")
                yield text + b"\n"
            except _ValueTooLongError:
                message = f"the record is longer than {LARGEST_LINE >> 20} MiB"
                shown = self._text[self._position : self._position + 400]
                yield unusable_line("line_too_long", message, shown)
                self._skip_long_value()
            separator = self.peek()
            if separator == "]":
                return
            if separator != ",":
                raise self.damaged(
                    "it is cut short"
                    if not separator
                    else f"there is {separator!r} where , or ] is expected"
                )
            self.skip(1)

    def leave(self, *, inside_object: bool) -> None:
        """Read the text after the array, up to the end of the file.

        Args:
            inside_object: Whether the array is a member of an object, whose other members follow.

        Raises:
            InputUnreadable: Something else follows, or the object has several arrays of records.
        """
        self.skip(1)
        if inside_object:
            while self.peek() == ",":
                self.skip(1)
                self._skip_member(self._read_key())
            if self.peek() != "}":
                raise self.damaged("the object around the records is not closed")
            if len(self._arrays) > 1:
                raise InputUnreadable(
                    f"{self._file} has several arrays of records: {', '.join(self._arrays)}",
                    remedy="write each array to a separate file, and use the files that you need: "
                    f"jq -c '.{self._arrays[0]}[]' FILE > {self._arrays[0]}.jsonl",
                )
            self.skip(1)
            self._report_unread()
        if self.peek():
            raise self.damaged("something follows the array of records")

    def _report_unread(self) -> None:
        """Log the texts of the object that are not in the array, once per file."""
        if self._unread and (self._file, *self._unread) not in _reported:
            _reported.add((self._file, *self._unread))
            names = ", ".join(map(repr, self._unread))
            Notice(
                f"only the array {self._arrays[0]!r} is read, and not the text under {names}",
                "if it belongs to the records, add it to each of them with"
                f" {setting('transform', 'FILE.py:NAME')}",
            ).log(f"{source_name(self._file)}: ")

    def damaged(self, what: str) -> InputUnreadable:
        """Return the error for malformed JSON, with the current position."""
        line = self._text.count("\n", 0, self._position) + 1
        position = (
            f"line {line}"
            if not self._discarded
            else f"character {self._discarded + self._position + 1:,}"
        )
        return InputUnreadable(
            f"{self._file} is not valid JSON: {what} ({position})",
            remedy="create the file again, or convert it to JSON lines",
        )

    def _read_key(self) -> str:
        try:
            key = self._read_value()
        except _ValueTooLongError as error:
            raise self.damaged("a key is not closed") from error
        if self.peek() != ":":
            raise self.damaged("a colon is missing")
        self.skip(1)
        return str(self._parse(key)[0])

    def _read_value(self) -> str:
        """Return the text of the value at the current position, and move behind it."""
        self.peek()
        while True:
            start = self._position
            try:
                _, end = self._parse(self._text, start)
                # A number at the end of the text may continue in the next chunk.
                if (
                    self._ended
                    or self._text[start] not in _NUMBER
                    or self._text[end : end + 1] in _AFTER_VALUE
                ):
                    self._position = end
                    return self._text[start:end]
            except RecursionError as error:
                raise self.damaged("it is nested too deeply") from error
            except json.JSONDecodeError as error:
                # An error near the end of the text may disappear with the next chunk.
                if self._ended or (
                    error.pos < len(self._text) - 64 and "Unterminated" not in error.msg
                ):
                    self._position = min(error.pos, len(self._text))
                    raise self.damaged(
                        "it is cut short"
                        if self._ended and error.pos >= len(self._text)
                        else error.msg
                    ) from error
            # Text before the value is discarded only here, so that small values do not copy the
            # rest of the chunk each time.
            self._text, self._discarded, self._position = (
                self._text[start:],
                self._discarded + start,
                0,
            )
            if len(self._text) > LARGEST_LINE:
                raise _ValueTooLongError
            # The text doubles, so that a long element is not parsed again for every chunk.
            wanted = 2 * len(self._text)
            while self._read_more() and len(self._text) < wanted:
                pass

    def _skip_member(self, key: str) -> None:
        """Skip the value of a key, and note it if it is an array of records."""
        if self.peek() == "[":
            # The first element decides, and may be in the next chunk.
            while not self._text[self._position + 1 :].strip(_WHITESPACE) and self._read_more():
                pass
            first = self._text[self._position + 1 :].lstrip(_WHITESPACE)[:1]
            if key in _DATA_KEYS or (first == "{" and key not in _DESCRIBING_KEYS):
                self._arrays.append(key)
        try:
            has_text = _has_text(self._parse(self._read_value())[0])
        except _ValueTooLongError:
            self._skip_long_value()
            has_text = True
        if has_text and key not in (*_DESCRIBING_KEYS, *self._arrays):
            self._unread.append(key)

    def _skip_long_value(self) -> None:
        """Skip an object, an array or a string, with at most one chunk of it in memory."""
        depth, in_string = 0, False
        while True:
            for found in _STRUCTURE.finditer(self._text, self._position):
                character = found[0]
                if character == '"':
                    in_string = not in_string
                elif not in_string and character[0] != "\\":
                    depth += 1 if character in "[{" else -1
                if depth <= 0 and not in_string:
                    self._position = found.end()
                    return
            # A backslash at the end of the chunk escapes the first character of the next one.
            rest = self._text[-1:] if _ends_in_escape(self._text) else ""
            self._discarded += len(self._text) - len(rest)
            self._text, self._position = rest, 0
            if not self._read_more():
                raise self.damaged("it is cut short")

    def _read_more(self) -> bool:
        """Read a chunk, and return whether there was one."""
        if self._ended:
            return False
        chunk = next(self._chunks)
        data = self._undecoded + chunk
        if not chunk:
            self._ended = True
            self._text += data.decode("utf-8", "surrogateescape")
            return bool(data)
        complete = _count_complete(data)
        text = data[:complete].decode("utf-8", "surrogateescape")
        if not self._discarded and not self._text:
            text = text.removeprefix("\ufeff")
        self._text += text
        self._undecoded = data[complete:]
        return True


class _ValueTooLongError(Exception):
    """A value too long to be held in memory."""


def _ends_in_escape(text: str) -> bool:
    """Return whether the last character is an escaping backslash.

    It then escapes the next character.
    """
    return (len(text) - len(text.rstrip("\\"))) % 2 == 1


def _has_text(value: object) -> bool:
    """Return whether a JSON value contains text of several words."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str) and len(item.split(maxsplit=1)) > 1:
            return True
        stack += item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
    return False


def _is_table(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _count_complete(data: bytes) -> int:
    """Return the number of bytes before a UTF-8 character cut off at the end."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte < 0x80:
            return len(data)
        if byte >= 0xC0:  # the first byte of a character, which determines its length
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) - back if length > back else len(data)
    return len(data)
