"""Lines of JSON read as columns, where they have the plainest shapes: no object is made of a line,
a message or a key.

Two shapes are read: a list of messages, each of a role and a content and nothing else, with any
other keys beside the list; and an object of strings. The quotes of all lines are found at once, and
what stands between two strings is compared with the few things that JSON of these shapes may have
there. Whatever is different in the least is left to the general way, line by line, so that this way
has nothing to say about errors. tests/sources/test_plain.py holds it against orjson.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import orjson
from numpy.typing import NDArray

from sftprep.lookup import Letters
from sftprep.ragged import SLOT, Pieces, Ragged, edges

_UNKNOWN = 255
_BACKSLASHES = 64
"""More of them before a quote than anyone writes: such a line is left to the general way, for each
one takes a look."""


@dataclass(frozen=True)
class Turns:
    """Conversations. lines: int64 [n]; message m is of conversation k for bounds[k] <= m < bounds[k
    + 1], int64 [n + 1]; content_first: whether the content of each message comes before its
    speaker, bool [n]; speakers: a byte a message, its place in the names of the layout; its content
    is written as data[first[m] : last[m]], without the quotes, int64 [messages]; it may be no text
    at all, with escapes that JSON does not have."""

    lines: NDArray[np.int64]
    bounds: NDArray[np.int64]
    content_first: NDArray[np.bool_]
    speakers: bytes
    data: bytes
    first: NDArray[np.int64]
    last: NDArray[np.int64]

    def written(self, conversations: NDArray[np.int64]) -> Pieces[np.uint8]:
        """The contents of these conversations as they are written, one after the other.
        conversations: in order."""
        rows = self.rows(conversations)
        return Pieces(self._bytes, self.first[rows], self.last[rows])

    def rows(self, conversations: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which messages are theirs: bool [messages]."""
        chosen = np.zeros(len(self.lines), np.bool_)
        chosen[conversations] = True
        return np.repeat(chosen, np.diff(self.bounds))

    def conversations(self, messages: Sequence[int] | NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which conversations hold one of these messages: bool [n]."""
        held = np.zeros(len(self.lines), np.bool_)
        held[np.searchsorted(self.bounds, messages, side="right") - 1] = True
        return held

    @cached_property
    def contents(self) -> list[str]:
        """A text a message. Raises orjson.JSONDecodeError where one is none."""
        return _texts(self.data, self.first, self.last)

    def contents_of(self, conversation: int) -> list[str]:
        """The same of one conversation."""
        begin, end = self.bounds[conversation : conversation + 2]
        return _texts(self.data, self.first[begin:end], self.last[begin:end])

    def sizes(self) -> NDArray[np.int64]:
        """Bytes in the contents of each conversation: int64 [n]."""
        ends = edges(self.last - self.first)
        return np.diff(ends[self.bounds])

    def readable(self) -> Turns:
        """The conversations whose contents are texts."""
        try:
            _ = self.contents
        except orjson.JSONDecodeError:
            pass
        else:
            return self
        _, unreadable = _each_text(self.data, self.first, self.last)
        counts = np.diff(self.bounds)
        keep = ~self.conversations(unreadable)
        rows = np.repeat(keep, counts)
        speakers = np.frombuffer(self.speakers, np.uint8)[rows].tobytes()
        bounds, first, last = edges(counts[keep]), self.first[rows], self.last[rows]
        return Turns(
            self.lines[keep], bounds, self.content_first[keep], speakers, self.data, first, last
        )

    @cached_property
    def begins(self) -> NDArray[np.bool_]:
        """Whether a content begins with a sign of ASCII that is no blank and written as it is: bool
        [messages]."""
        return (self.first < self.last) & _is_sign(self._bytes[self.first])

    @cached_property
    def ends(self) -> NDArray[np.bool_]:
        """Whether a content ends with one."""
        # The longest escape has six letters. Of the last eight, the first two are made something
        # else than a backslash.
        found = (self._last_eight | np.uint64(0xFFFF)) ^ np.uint64(0x5C5C5C5C5C5C5C5C)
        escaped = (found - np.uint64(0x0101010101010101)) & ~found & np.uint64(0x8080808080808080)
        ends: NDArray[np.bool_] = _is_sign((self._last_eight >> np.uint64(56)).astype(np.uint8)) & (
            escaped == 0
        )
        return (self.first < self.last) & ends

    def may_end_early(self) -> NDArray[np.bool_]:
        """Whether a content may end within an escape, which what is written after it could
        complete: bool [messages]."""
        early = np.zeros(len(self.last), np.bool_)
        for letters in (2, 3, 4, 5):
            begun = (self._last_eight >> np.uint64(64 - 8 * letters)) & np.uint64(0xFFFF)
            early |= begun == int.from_bytes(rb"\u", "little")
        return early

    @cached_property
    def _last_eight(self) -> NDArray[np.uint64]:
        """The last eight bytes of each content, or of what stands before a shorter one; the last
        one is the highest."""
        words = np.ndarray((len(self.data) - 7,), "<u8", buffer=self.data, strides=(1,))
        # In front of a content there is at least the brace, a key, and their quotes.
        return words[self.last - 8]

    @property
    def _bytes(self) -> NDArray[np.uint8]:
        return np.frombuffer(self.data, np.uint8)


@dataclass(frozen=True, slots=True)
class Fields:
    """Objects of strings. lines: int64 [n]; values: a text a line for each wanted key."""

    lines: NDArray[np.int64]
    values: dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a list of messages is written. key: of the list; speaker, content: keys of a message;
    names: those of speakers."""

    key: str
    speaker: str
    content: str
    names: tuple[str, ...]


class PlainLines:
    """The strings of some lines of JSON.

    String i is data[first[i] : last[i]], without its quotes and as it is written; those of line n
    are bounds[n] .. bounds[n+1]-1.
    """

    def __init__(self, letters: Letters) -> None:
        """letters: of whole lines. Raises UnicodeDecodeError where they are not UTF-8."""
        data = letters.data
        if not data.isascii():
            data.decode()
        ended = data if data.endswith(b"\n") else data + b"\n"
        self._data = ended + bytes(16)  # so that eight bytes can be read from each place
        self._bytes = np.frombuffer(self._data, np.uint8)[: len(ended)]
        self._words = np.ndarray((len(self._data) - 8,), "<u8", buffer=self._data, strides=(1,))
        newlines = letters.places(ord("\n"))
        self.ends = newlines if ended is data else np.append(newlines, len(data))
        self.odd = np.zeros(len(self.ends), np.bool_)
        """Lines that may be of no plain shape, whatever they look like."""
        control = self._bytes < 32
        if np.count_nonzero(control) > len(self.ends):
            places = np.flatnonzero(control)
            kinds, following = (
                self._bytes[places],
                self._bytes[np.minimum(places + 1, len(ended) - 1)],
            )
            self.odd[
                np.searchsorted(
                    self.ends, places[(kinds != 10) & ~((kinds == 13) & (following == 10))]
                )
            ] = True
        quotes = self._quotes()
        counts = np.diff(np.searchsorted(quotes, self.ends), prepend=0)
        unpaired = counts % 2 == 1
        if unpaired.any():
            self.odd |= unpaired
            quotes = quotes[~np.repeat(unpaired, counts)]
            counts[unpaired] = 0
        self.first, self.last = quotes[0::2] + 1, quotes[1::2]
        self.bounds = edges(counts // 2)
        self._after = self._words[self.last + 1]

    def turns(self, layout: Layout, looked: frozenset[str]) -> Turns:
        """The lines that are conversations of this layout. looked: keys beside the list that would
        change what a line means."""
        lines, opens, closes = self._lists(layout.key)
        counts = (closes - opens) // 4
        firsts = np.cumsum(counts) - counts
        key = np.arange(int(counts.sum())) * 4 + np.repeat(opens + 1 - 4 * firsts, counts)
        content_first = ~self._spells(opens + 1, layout.speaker)
        shift = np.repeat(2 * content_first, counts)
        who, what = key + shift, key + 2 - shift
        # Keys in another order than in the first message are not these.
        right = self._spells(who, layout.speaker) & self._spells(what, layout.content)
        right &= (
            self._follows(key, b":") & self._follows(key + 2, b":") & self._follows(key + 1, b",")
        )
        followed = self._follows(key + 3, b"},", b"{")
        followed[firsts + counts - 1] = True
        speakers = self._named(who + 1, layout.names)
        right &= followed & (speakers != _UNKNOWN)
        kept = np.logical_and.reduceat(right, firsts) if len(firsts) else np.zeros(0, np.bool_)
        kept &= self._alone(lines, opens, closes, layout.key, looked, kept)
        chosen = np.repeat(kept, counts)
        texts = what[chosen] + 1
        speaks = speakers[chosen].tobytes()
        bounds = edges(counts[kept])
        return Turns(
            lines[kept],
            bounds,
            content_first[kept],
            speaks,
            self._data,
            self.first[texts],
            self.last[texts],
        )

    def fields(self, wanted: Sequence[str], looked: frozenset[str]) -> Fields:
        """The lines that are objects of strings and have each wanted key once, and none of the
        others in `looked`."""
        counts = np.diff(self.bounds)
        starts = self._starts_of_lines
        lines = np.flatnonzero(~self.odd & (counts > 0) & (counts % 2 == 0))
        opened = self.first[self.bounds[lines]] == starts[lines] + 2
        lines = lines[opened & (self._bytes[starts[lines]] == ord("{"))]
        counts = counts[lines] // 2
        firsts = np.cumsum(counts) - counts
        key = np.arange(int(counts.sum())) * 2 + np.repeat(self.bounds[lines] - 2 * firsts, counts)
        right = self._follows(key, b":") & ~self._escaped(key)
        followed = self._follows(key + 1, b",")
        followed[firsts + counts - 1] = self._closes(key[firsts + counts - 1] + 1, b"}")
        named = self._named(key, [*wanted, *sorted(looked - {*wanted})])
        right &= followed & (
            (named < len(wanted)) | ((named == _UNKNOWN) & ~self._escaped(key + 1))
        )
        kept = np.logical_and.reduceat(right, firsts) if len(firsts) else np.zeros(0, np.bool_)
        of_name = {name: named == number for number, name in enumerate(wanted)}
        for spelled in of_name.values():
            kept &= (
                np.add.reduceat(spelled, firsts, dtype=np.int64) if len(firsts) else firsts
            ) == 1
        chosen = np.repeat(kept, counts)
        values: dict[str, list[str]] = {}
        unreadable: set[int] = set()
        for name, spelled in of_name.items():
            strings = key[spelled & chosen] + 1
            written = self._data, self.first[strings], self.last[strings]
            try:
                values[name] = _texts(*written)
            except orjson.JSONDecodeError:
                values[name], missed = _each_text(*written)
                unreadable.update(missed)
        left = np.ones(int(kept.sum()), np.bool_)
        left[list(unreadable)] = False
        if unreadable:
            values = {
                name: [text for text, keep in zip(own, left.tolist(), strict=True) if keep]
                for name, own in values.items()
            }
        return Fields(lines[kept][left], values)

    @cached_property
    def _starts_of_lines(self) -> NDArray[np.int64]:
        return np.concatenate(([0], self.ends[:-1] + 1))

    # --- strings and what stands between them -----------------------------------------------------

    def _quotes(self) -> NDArray[np.int64]:
        """Places of the quotes that begin or end a string; lines with more backslashes than that
        are odd."""
        quotes = np.flatnonzero(self._bytes == ord('"'))
        escaped = np.zeros(len(quotes), np.bool_)
        at = quotes - 1
        open_ones = np.flatnonzero(self._bytes[at] == ord("\\"))
        for _ in range(_BACKSLASHES):
            if not len(open_ones):
                break
            escaped[open_ones] ^= True
            at[open_ones] -= 1
            open_ones = open_ones[self._bytes[at[open_ones]] == ord("\\")]
        self.odd[np.searchsorted(self.ends, quotes[open_ones])] = True
        return quotes[~escaped]

    def _starts(self, words: NDArray[np.uint64], written: bytes) -> NDArray[np.bool_]:
        """Whether words, eight bytes each, start with these."""
        same: NDArray[np.bool_] = (words & np.uint64((1 << 8 * len(written)) - 1)) == np.uint64(
            int.from_bytes(written, "little")
        )
        return same

    def _follows(self, strings: NDArray[np.int64], *marks: bytes) -> NDArray[np.bool_]:
        """Whether these marks stand after a string and before the next one, a blank or nothing
        after the last but one."""
        words = self._after[strings]
        head, tail = marks[0], b"".join(marks[1:]) + b'"'
        return self._starts(words, head + b" " + tail) | self._starts(words, head + tail)

    def _closes(self, strings: NDArray[np.int64], written: bytes) -> NDArray[np.bool_]:
        """Whether a line ends after a string and what is written here."""
        words = self._after[strings]
        return self._starts(words, written + b"\n") | self._starts(words, written + b"\r\n")

    def _spells(self, strings: NDArray[np.int64], name: str) -> NDArray[np.bool_]:
        """Whether a string is this name, as it is."""
        written = _written(name)
        places = self.first[strings]
        same: NDArray[np.bool_] = self._starts(self._words[places], written[:8])
        for begin in [*range(8, len(written) - 8, 8), len(written) - 8] if len(written) > 8 else []:
            same &= self._starts(
                self._words[np.minimum(places + begin, len(self._words) - 1)],
                written[begin : begin + 8],
            )
        return same

    def _named(self, strings: NDArray[np.int64], names: Sequence[str]) -> NDArray[np.uint8]:
        """Which of the names each string is: its number, or _UNKNOWN."""
        numbers = np.full(len(strings), _UNKNOWN, np.uint8)
        heads = self._words[self.first[strings]]
        for number, name in enumerate(names):
            written = _written(name)
            found = np.flatnonzero(self._starts(heads, written[:8]))
            numbers[found if len(written) <= 8 else found[self._spells(strings[found], name)]] = (
                min(number, _UNKNOWN - 1)
            )
        return numbers

    def _escaped(self, strings: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether a string has a backslash in it."""
        before, until = (
            np.searchsorted(self._backslashes, places[strings])
            for places in (self.first, self.last)
        )
        escaped: NDArray[np.bool_] = before != until
        return escaped

    @cached_property
    def _backslashes(self) -> NDArray[np.int64]:
        return np.flatnonzero(self._bytes == ord("\\"))

    # --- lists of messages ------------------------------------------------------------------------

    def _lists(self, key: str) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Lines with a list of objects of this key, the number of the key's string, and that of the
        last string in the list."""
        words = self._after
        every = np.flatnonzero(self._starts(words, b': [{"') | self._starts(words, b':[{"'))
        opens = every[self._spells(every, key)]
        closing = np.flatnonzero(self._starts(words, b"}]"))
        lines, first = np.unique(
            np.searchsorted(self.bounds, opens, side="right") - 1, return_index=True
        )
        opens = opens[first]
        following = np.searchsorted(closing, opens, side="right")
        closes = np.append(closing, len(words))[following]
        whole = (closes < self.bounds[lines + 1]) & ((closes - opens) % 4 == 0) & ~self.odd[lines]
        return lines[whole], opens[whole], closes[whole]

    def _alone(
        self,
        lines: NDArray[np.int64],
        opens: NDArray[np.int64],
        closes: NDArray[np.int64],
        key: str,
        looked: frozenset[str],
        asked: NDArray[np.bool_],
    ) -> NDArray[np.bool_]:
        """Whether what stands around a list makes an object of it, without keys that matter. asked:
        which lists to look at."""
        starts = self._starts_of_lines[lines]
        headless = (self.first[opens] == starts + 2) & (self._bytes[starts] == ord("{"))
        alone: NDArray[np.bool_] = headless & self._closes(closes, b"}]}")
        lists, rests = self.first[opens + 1] - 3, self.last[closes] + 3
        for number in np.flatnonzero(asked & ~alone).tolist():
            head = self._data[int(starts[number]) : int(lists[number])]
            tail = self._data[int(rests[number]) : int(self.ends[lines[number]])]
            try:
                # Each is an object by itself only if the list stands in the outermost one.
                before, after = orjson.loads(head + b"null}"), orjson.loads(b'{"":null' + tail)
            except orjson.JSONDecodeError:
                continue
            beside = (before.keys() - {key}) | after.keys()
            alone[number] = key not in after and looked.isdisjoint(beside)
        return alone


def _written(name: str) -> bytes:
    """A name and the quote after it; for one that is never written as it is, what no string starts
    with."""
    return b"\n" if '"' in name or "\\" in name else name.encode("utf-8", "surrogatepass") + b'"'


def _texts(data: bytes, first: NDArray[np.int64], last: NDArray[np.int64]) -> list[str]:
    """The texts that stand between these places and quotes around them. Raises
    orjson.JSONDecodeError."""
    if not len(first):
        return []
    order = np.full(2 * len(first) + 1, SLOT)
    order[::2] = 1
    order[0], order[-1] = 0, 2
    strings = Pieces(np.frombuffer(data, np.uint8), first - 1, last + 1)
    texts: list[str] = orjson.loads(strings.within(order, _LIST).values.data)
    return texts


_LIST: Ragged[np.uint8] = Ragged.of(
    [np.frombuffer(sign, np.uint8) for sign in (b"[", b",", b"]")], np.uint8
)


def _each_text(
    data: bytes, first: NDArray[np.int64], last: NDArray[np.int64]
) -> tuple[list[str], list[int]]:
    """The same, "" for what is no text, and the numbers of those."""
    texts, unreadable = [""] * len(first), []
    for number, (begin, end) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
        try:
            texts[number] = orjson.loads(data[begin - 1 : end + 1])
        except orjson.JSONDecodeError:
            unreadable.append(number)
    return texts, unreadable


def _is_sign(letters: NDArray[np.uint8]) -> NDArray[np.bool_]:
    signs: NDArray[np.bool_] = (letters > 32) & (letters < 127) & (letters != ord("\\"))
    return signs
